/**
 * The connections in each state as tables, one for each event: what the drawings say, for every screen and reader. An
 * event with one state has none: it would only repeat the number of connections.
 */

import { html, setText } from "./dom.js";
import { updateChildren } from "./keyed.js";
import { formatCount } from "./numbers.js";
import { formatDuration } from "./times.js";

/**
 * Show the tables.
 * @param {Element} container
 * @param {{event: string, client: string, states: object[]}[]} charts
 */
export function showStates(container, charts) {
  const events = [...new Set(charts.map((chart) => chart.event))]
    .map((event) => ({ event, charts: charts.filter((chart) => chart.event === event) }))
    .filter((event) => event.charts.some(({ states }) => states.length > 1));
  updateChildren(container, events, { key: ({ event }) => event, create: createTable, update: updateTable });
}

function createTable({ event, charts }) {
  const columns = charts.map(({ client }) => html("th", { scope: "col", class: "number" }, client));
  return html(
    "table",
    { class: "table states" },
    html("caption", {}, html("code", {}, event)),
    html("thead", {}, html("tr", {}, html("th", { scope: "col" }, "State"), ...columns)),
    html("tbody"),
  );
}

function updateTable(table, { charts }) {
  const names = [...new Set(charts.flatMap((chart) => chart.states.map(({ state }) => state)))];
  const rows = names.map((name) => ({
    name,
    states: charts.map((chart) => chart.states.find(({ state }) => state === name)),
  }));
  updateChildren(table.tBodies[0], rows, { key: ({ name }) => name, create: createRow, update: updateRow });
}

function createRow({ name, states }) {
  const cells = states.map(() => html("td", { class: "number" }, html("span"), " ", makeStuckMark()));
  return html("tr", {}, html("th", { scope: "row" }, html("code", {}, name)), ...cells);
}

function makeStuckMark() {
  return html("span", { class: "stuck-for" }, html("span", { class: "stuck-word" }, "stuck "), html("span"));
}

function updateRow(row, { states }) {
  states.forEach((state, index) => {
    const cell = row.cells[index + 1];
    const isStuck = state?.is_stuck ?? false;
    cell.classList.toggle("is-stuck", isStuck);
    cell.classList.toggle("is-nobody", !state?.count);
    setText(cell.firstChild, state ? formatCount(state.count) : "–");
    cell.lastChild.hidden = !isStuck;
    setText(cell.lastChild.lastChild, isStuck ? formatDuration(state.longest) : "");
  });
}
