/** Sortable column headers: each is a button, and aria-sort on the header says what the rows are sorted by. */

import { setAttribute } from "./dom.js";

const DIRECTIONS = { asc: "ascending", desc: "descending" };

/**
 * Make the headers of a table sort it.
 * @param {HTMLTableElement} table its header buttons have data-sort, and data-first: the order after the first press
 * @param {(sort: string, order: string) => void} onChoose
 * @returns {(sort: string, order: string) => void} shows what the rows are sorted by
 */
export function sorting(table, onChoose) {
  const buttons = [...table.querySelectorAll("button[data-sort]")];
  let sorted = {};
  table.tHead.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-sort]");
    if (!button) return;
    const { sort, first } = button.dataset;
    const opposite = sorted.order === "asc" ? "desc" : "asc";
    onChoose(sort, sort === sorted.sort ? opposite : first);
  });
  return (sort, order) => {
    sorted = { sort, order };
    for (const button of buttons) {
      const direction = button.dataset.sort === sort ? (DIRECTIONS[order] ?? null) : null;
      setAttribute(button.closest("th"), "aria-sort", direction);
    }
  };
}
