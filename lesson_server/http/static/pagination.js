/** The pages of a list: previous, next, and where the reader is. */

import { setAttribute, setText } from "./dom.js";
import { formatCount } from "./numbers.js";

/**
 * Make a <nav class="pagination"> work.
 * @param {Element} nav
 * @param {(page: number) => void} onChoose
 * @returns {(page: number, pages: number) => void} shows the page; hides the nav when there is only one
 */
export function pagination(nav, onChoose) {
  const place = nav.querySelector(".pagination-place");
  const buttons = [...nav.querySelectorAll("button")];
  let current = 1;
  nav.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button && button.ariaDisabled !== "true") onChoose(current + Number(button.dataset.step));
  });
  return (page, pages) => {
    current = page;
    nav.hidden = pages <= 1;
    setText(place, `Page ${formatCount(page)} of ${formatCount(pages)}`);
    for (const button of buttons) {
      const target = page + Number(button.dataset.step);
      // Not `disabled`: the button that leads to the last page would lose the focus there.
      setAttribute(button, "aria-disabled", target < 1 || target > pages ? "true" : null);
    }
  };
}
