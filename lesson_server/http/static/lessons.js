/** The lessons in which somebody is: searched, sorted and paged by the server. */

import { announce } from "./announce.js";
import { makeCell, makeHeading, makeRow, setBar, setMark } from "./cells.js";
import { debounce, html, setText } from "./dom.js";
import { updateChildren } from "./keyed.js";
import { formatAmount, formatCount } from "./numbers.js";
import { pagination } from "./pagination.js";
import { sorting } from "./sorting.js";

// Milliseconds after the last key before the server is asked.
const TYPING = 250;

/** @typedef {{search: string, sort: string, order: string, page: string}} Choices */

/** What the view shows before anybody has chosen. */
export const DEFAULT_CHOICES = { search: "", sort: "lesson_id", order: "asc", page: "1" };

/**
 * Make the section of the lessons work.
 * @param {Element} section
 * @param {(changes: Partial<Choices>, isNewEntry: boolean) => void} onChoose
 */
export function lessonsView(section, onChoose) {
  const form = section.querySelector("form");
  const table = section.querySelector("table");
  const summary = section.querySelector(".panel-summary");
  const noMatch = section.querySelector(".no-match");
  const firstSteps = section.querySelector(".first-steps");
  let isAwaited = false; // whether the reader waits for the lessons of a new choice
  let search = "";

  const choose = (changes, isNewEntry) => {
    isAwaited = true;
    onChoose(changes, isNewEntry);
  };
  const showSorting = sorting(table, (sort, order) => choose({ sort, order, page: "1" }, true));
  const showPage = pagination(section.querySelector(".pagination"), (page) => {
    choose({ page: String(page) }, true);
    table.parentElement.scrollTop = 0;
    if (section.getBoundingClientRect().top < 0) section.scrollIntoView();
  });
  const searchNow = () => {
    const text = form.elements.search.value.trim();
    // Back leads out of a search, not through each of its letters.
    if (text !== search) choose({ search: text, page: "1" }, search === "");
  };
  form.addEventListener("input", debounce(TYPING, searchNow));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    searchNow();
  });

  return {
    /**
     * Show what has been chosen.
     * @param {Choices} choices
     */
    showChoices(choices) {
      search = choices.search;
      if (form.elements.search.value.trim() !== search) form.elements.search.value = search;
      showSorting(choices.sort, choices.order);
      table.ariaBusy = "true";
    },

    /**
     * Show the lessons.
     * @param {object} data of the event `lessons`
     */
    show({ total, page, pages, lessons }) {
      updateChildren(table.tBodies[0], lessons, {
        key: (lesson) => lesson.lesson_id,
        create: createRow,
        update: updateRow,
      });
      table.parentElement.style.setProperty("--rows", String(lessons.length));
      showPage(page, pages);
      setText(summary, formatAmount(total, "lesson"));
      table.ariaBusy = "false";
      table.hidden = total === 0;
      noMatch.hidden = total > 0 || search === "";
      firstSteps.hidden = total > 0 || search !== "";
      setText(noMatch.querySelector("q"), search);
      if (isAwaited) announce(`${formatAmount(total, "lesson")}, page ${page} of ${Math.max(1, pages)}`);
      isAwaited = false;
    },
  };
}

function createRow({ lesson_id: id }) {
  const link = html("a", { href: `/console/lessons/${encodeURIComponent(id)}` }, id);
  return makeRow(
    makeHeading("Lesson", "identifier", link),
    makeCell("Teacher", "teacher", html("span")),
    makeCell("Participants", "number participants"),
    makeCell("Guests", "number guests"),
    makeCell("Taken", "number taken", html("i", { class: "bar", "aria-hidden": "true" }), html("span")),
    makeCell("Seats", "number seats"),
  );
}

function updateRow(row, { teachers, participants, guests, taken, seats }) {
  const [, teacher, participantsCell, guestsCell, takenCell, seatsCell] = row.cells;
  const word = teachers > 1 ? formatAmount(teachers, "teacher") : "There";
  const isMissing = teachers === 0 && participants + guests > 0;
  if (teachers > 0) setMark(teacher.firstChild, "good", word);
  else setMark(teacher.firstChild, isMissing ? "warning" : "neutral", "None");
  setText(participantsCell, formatCount(participants));
  setText(guestsCell, formatCount(guests));
  setText(takenCell.lastChild, formatCount(taken));
  takenCell.firstChild.hidden = seats === 0;
  setBar(takenCell.firstChild, seats ? taken / seats : 0);
  setText(seatsCell, formatCount(seats));
}
