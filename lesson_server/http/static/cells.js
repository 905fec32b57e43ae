/**
 * Cells of tables. Each has its role written out, and its column's name: on a narrow screen CSS makes blocks of them,
 * which would take their roles away.
 */

import { html } from "./dom.js";

/**
 * Make a row.
 * @param {...HTMLElement} cells
 */
export const makeRow = (...cells) => html("tr", { role: "row" }, ...cells);

/**
 * Make a cell.
 * @param {string} label the name of its column
 * @param {string} className
 * @param {...(Node|string)} children
 */
export const makeCell = (label, className, ...children) =>
  html("td", { role: "cell", class: className, "data-label": label }, ...children);

/**
 * Make the cell that names its row.
 * @param {string} label the name of its column
 * @param {string} className
 * @param {...(Node|string)} children
 */
export const makeHeading = (label, className, ...children) =>
  html("th", { role: "rowheader", scope: "row", class: className, "data-label": label }, ...children);

/**
 * Show a status as a mark: a sign, a word and a colour, never the colour alone.
 * @param {Element} mark
 * @param {"good"|"warning"|"bad"|"neutral"} level
 * @param {string} word
 */
export function setMark(mark, level, word) {
  mark.className = `status status-${level}`;
  if (mark.textContent !== word) mark.textContent = word;
}

/**
 * Show a share as a bar beside a number; it is for the eye only, the number is beside it.
 * @param {HTMLElement} bar
 * @param {number} share 0 to 1
 */
export function setBar(bar, share) {
  bar.style.setProperty("--share", Math.min(1, Math.max(0, share)).toFixed(3));
}
