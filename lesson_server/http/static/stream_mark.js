/** The mark that says whether the page is live; a screen reader is told when that changes, and only then. */

import { setText } from "./dom.js";
import { formatTime, runAges } from "./times.js";

/**
 * Return the function that shows the status of the event stream.
 * @returns {(status: import("./stream.js").Status) => void}
 */
export function streamMark() {
  const mark = document.getElementById("stream-mark");
  const text = mark.querySelector(".mark-text");
  const title = document.title;
  let heard = null;
  return (status) => {
    if (status === "live") heard = new Date();
    if (mark.dataset.status === status) return;
    mark.dataset.status = status;
    runAges(status === "live");
    document.title = status === "lost" ? `Connection lost · ${title}` : title;
    if (status === "live") setText(text, "Live");
    else if (heard) setText(text, `Connection lost. This is from ${formatTime(heard)}. Connecting again…`);
    else setText(text, "The server does not answer. Connecting again…");
  };
}
