/** The refusals of the last ten minutes by reason, the most frequent first. */

import { html, setText } from "./dom.js";
import { updateChildren } from "./keyed.js";
import { formatCount } from "./numbers.js";

/**
 * Show the refusals.
 * @param {HTMLTableElement} table
 * @param {{event: string, client: string, outcome: string, count: number}[]} refusals
 */
export function showRefusals(table, refusals) {
  const sorted = [...refusals].sort((one, other) => other.count - one.count);
  updateChildren(table.tBodies[0], sorted, {
    key: ({ event, client, outcome }) => `${event} ${client} ${outcome}`,
    create: createRow,
    update: (row, { count }) => setText(row.cells[2], formatCount(count)),
  });
  table.hidden = refusals.length === 0;
}

function createRow({ event, client, outcome }) {
  return html(
    "tr",
    {},
    html("th", { scope: "row" }, html("code", {}, outcome)),
    html("td", {}, html("small", {}, client ? `${event}, ${client}` : event)),
    html("td", { class: "number" }),
  );
}
