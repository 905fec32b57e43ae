/** The people in a lesson: teachers first, then a page of the participants. */

import { makeCell, makeHeading, makeRow } from "./cells.js";
import { html, setText } from "./dom.js";
import { updateChildren } from "./keyed.js";
import { makeTime, setAge, setTime } from "./times.js";

/**
 * @typedef {object} Person
 * @property {"teachers"|"participants"} kind as in the path of the roster
 * @property {string} id
 * @property {string} role
 * @property {string} sid
 * @property {string|null} node
 * @property {string|null} since
 * @property {string[]} seats the numbers of the person's seats, at most one as a rule
 */

/**
 * Collect the people of a lesson.
 * @param {object} lesson the data of the event `lesson`
 * @returns {Person[]}
 */
export function peopleOf({ teachers, participants, seats }) {
  const seatsOf = new Map();
  for (const [number, occupant] of Object.entries(seats)) {
    if (occupant) seatsOf.set(occupant, [...(seatsOf.get(occupant) ?? []), number]);
  }
  return [
    ...teachers.map((teacher) => ({ ...teacher, kind: "teachers", id: teacher.user_id, role: "teacher", seats: [] })),
    ...participants.map((participant) => ({
      ...participant,
      kind: "participants",
      id: participant.client_id,
      seats: seatsOf.get(participant.client_id) ?? [],
    })),
  ];
}

/**
 * Show the people.
 * @param {HTMLTableElement} table
 * @param {Person[]} people
 */
export function showPeople(table, people) {
  updateChildren(table.tBodies[0], people, {
    key: ({ kind, id }) => `${kind} ${id}`,
    create: createRow,
    update: updateRow,
  });
}

function createRow({ id, kind }) {
  const button = html("button", { type: "button", class: "button button-quiet", "data-kind": kind, "data-id": id });
  button.append("Remove…", html("span", { class: "visually-hidden" }, ` ${id}`));
  return makeRow(
    makeHeading("Name", "identifier", id),
    makeCell("Role", "role"),
    makeCell("Seat", "number seat-of"),
    makeCell("Since", "since", makeTime(), " ", html("span", { class: "age" })),
    makeCell("Node", "identifier node", html("code")),
    makeCell("Sid", "identifier sid", html("code")),
    makeCell("Action", "action", button),
  );
}

function updateRow(row, { kind, role, sid, node, since, seats }) {
  const [, roleCell, seat, sinceCell, nodeCell, sidCell] = row.cells;
  row.classList.toggle("is-teacher", kind === "teachers");
  setText(roleCell, role);
  setText(seat, seats.join(", ") || "–");
  const [time, age] = sinceCell.children;
  if (since === null) setText(time, "unknown");
  else setTime(time, since);
  setAge(age, since);
  setText(nodeCell.firstChild, node ?? "unknown");
  setText(sidCell.firstChild, sid);
}
