/** Single numbers of a page: elements with data-figure, which names the number. */

import { setText } from "./dom.js";
import { formatCount } from "./numbers.js";

/**
 * Show numbers in the elements that are named after them.
 * @param {Record<string, number>} numbers
 */
export function showFigures(numbers) {
  for (const element of document.querySelectorAll("[data-figure]")) {
    const number = numbers[element.dataset.figure];
    if (number !== undefined) setText(element, formatCount(number));
  }
}
