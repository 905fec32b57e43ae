/** The refusals of the last ten minutes by reason, the most frequent first. */

import { makeCell, makeHeading, makeRow } from "./cells.js";
import { html, setText } from "./dom.js";
import { updateChildren } from "./keyed.js";
import { formatCount } from "./numbers.js";

/**
 * Show the refusals.
 * @param {Element} section
 * @param {{event: string, client: string, outcome: string, count: number}[]} refusals
 */
export function showRefusals(section, refusals) {
  const table = section.querySelector("table");
  const sorted = refusals.toSorted((one, other) => other.count - one.count);
  updateChildren(table.tBodies[0], sorted, {
    key: ({ event, client, outcome }) => `${event} ${client} ${outcome}`,
    create: createRow,
    update: (row, { count }) => setText(row.cells[2], formatCount(count)),
  });
  table.hidden = refusals.length === 0;
  section.querySelector(".none").hidden = refusals.length > 0;
}

function createRow({ event, client, outcome }) {
  return makeRow(
    makeHeading("Reason", "", html("code", {}, outcome)),
    makeCell("Event, client", "", html("code", {}, event), client ? `, ${client}` : ""),
    makeCell("Count", "number"),
  );
}
