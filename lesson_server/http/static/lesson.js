/** The page of one lesson. */

import { setMark } from "./cells.js";
import { completeCommands } from "./commands.js";
import { setText } from "./dom.js";
import { showFigures } from "./figures.js";
import { formatAmount } from "./numbers.js";
import { pagination } from "./pagination.js";
import { peopleOf, showPeople } from "./people.js";
import { readQuery, writeQuery } from "./query.js";
import { removalDialog } from "./removal.js";
import { SeatGrid, describeSeats } from "./seat_grid.js";
import { EventStream } from "./stream.js";
import { streamMark } from "./stream_mark.js";

const DEFAULTS = { page: "1" };

const section = (id) => document.getElementById(id);
const { lessonId } = section("lesson").dataset;
const table = section("people").querySelector("table");
const grid = new SeatGrid(section("seat-grid"), section("seat-readout"));
const askToRemove = removalDialog(section("removal"), lessonId);
const showPage = pagination(section("people").querySelector(".pagination"), (page) => {
  writeQuery({ page: String(page) }, DEFAULTS, true);
  open();
  if (section("people").getBoundingClientRect().top < 0) section("people").scrollIntoView();
});
const stream = new EventStream({ lesson: show }, streamMark());

function show(lesson) {
  const seats = Object.values(lesson.seats);
  const taken = seats.filter((occupant) => occupant !== "").length;
  showFigures({ participants: lesson.total, guests: lesson.guests, taken, seats: seats.length });
  showTeacher(lesson);
  grid.show(lesson.seats, new Set(lesson.away));
  section("seat-grid").parentElement.hidden = section("seat-readout").hidden = seats.length === 0;
  setText(
    section("seats").querySelector(".panel-summary"),
    lesson.found ? describeSeats(taken, seats.length, lesson.away.length) : "Redis knows nothing of this lesson.",
  );
  const people = peopleOf(lesson);
  showPeople(table, people);
  showPage(lesson.page, lesson.pages);
  table.ariaBusy = "false";
  table.hidden = people.length === 0;
  setText(
    section("people").querySelector(".panel-summary"),
    `${formatAmount(lesson.teachers.length, "teacher")}, ${formatAmount(lesson.total, "participant")}`,
  );
  section("nobody").hidden = people.length > 0 || lesson.guests > 0;
  section("guests-note").hidden = lesson.guests === 0;
}

function showTeacher({ teachers, total, guests }) {
  const mark = section("teacher-mark");
  if (teachers.length > 0) setMark(mark, "good", teachers.length > 1 ? `${teachers.length} there` : "There");
  else setMark(mark, total + guests > 0 ? "warning" : "neutral", "None");
}

function open() {
  table.ariaBusy = "true";
  const { page } = readQuery(DEFAULTS);
  stream.open(`/console/events?${new URLSearchParams({ lesson: lessonId, page })}`);
}

table.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-id]");
  if (button) askToRemove(button.dataset.kind, button.dataset.id);
});
addEventListener("popstate", open);
completeCommands();
open();
