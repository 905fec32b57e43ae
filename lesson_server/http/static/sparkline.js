/** Small charts of the last ten minutes: the current value as text, the shape as a drawing. */

import { setAttribute, setText, svg } from "./dom.js";
import { formatDuration } from "./times.js";

// The drawing's own units; it is stretched to the width of its place.
const WIDTH = 240;
const HEIGHT = 48;
// Room above and below, so that the line is not cut.
const MARGIN = 3;

/**
 * Make a sparkline.
 * @param {HTMLElement} tile with the children .tile-label, .tile-value, .tile-note and .sparkline
 * @param {(value: number) => string} format
 * @param {boolean} isFilled whether the area under the line is filled: for amounts, not for durations
 * @returns {(points: (number|null)[], seconds: number) => void} shows the points, oldest first, `seconds` apart
 */
export function sparkline(tile, format, isFilled) {
  const label = tile.querySelector(".tile-label").textContent;
  const value = tile.querySelector(".tile-value");
  const note = tile.querySelector(".tile-note");
  const picture = tile.querySelector(".sparkline");
  const area = svg("path", { class: "sparkline-area" });
  const line = svg("path", { class: "sparkline-line" });
  const cursor = svg("path", { class: "sparkline-cursor" });
  const drawing = svg(
    "svg",
    { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" },
    area,
    line,
    cursor,
  );
  picture.append(drawing);

  let points = [];
  let seconds = 0;
  let pointed = null; // the index of the point under the pointer

  const showNote = () => {
    const index = pointed ?? lastKnown(points);
    const age = (points.length - 1 - index) * seconds;
    if (index < 0) setText(note, "no join in 10 minutes");
    else if (pointed === null) setText(note, age > 0 ? `${formatDuration(age)} ago` : "now");
    else setText(note, `${points[index] === null ? "no join" : format(points[index])}, ${formatDuration(age)} ago`);
    setAttribute(cursor, "d", pointed === null ? "" : `M${x(index, points.length)} 0V${HEIGHT}`);
  };
  picture.addEventListener("pointermove", (event) => {
    if (points.length === 0) return;
    const share = event.offsetX / picture.clientWidth;
    pointed = Math.min(points.length - 1, Math.max(0, Math.round(share * (points.length - 1))));
    showNote();
  });
  picture.addEventListener("pointerleave", () => {
    pointed = null;
    showNote();
  });

  return (newPoints, newSeconds) => {
    points = newPoints;
    seconds = newSeconds;
    const known = points.filter((point) => point !== null);
    const highest = Math.max(0, ...known);
    const runs = runsOf(points, highest);
    setAttribute(line, "d", runs.map(outline).join(""));
    if (isFilled) setAttribute(area, "d", runs.map((run) => `${outline(run)}V${HEIGHT}H${run[0][0]}Z`).join(""));
    setText(value, known.length ? format(known.at(-1)) : "–");
    setText(tile.querySelector(".tile-highest"), known.length ? `highest ${format(highest)}` : "");
    const span = formatDuration(points.length * seconds);
    const summary = known.length
      ? `last ${format(known.at(-1))}, lowest ${format(Math.min(...known))}, highest ${format(highest)}`
      : "no join";
    setAttribute(drawing, "aria-label", `${label} in the last ${span}: ${summary}`);
    showNote();
  };
}

function lastKnown(points) {
  let index = points.length - 1;
  while (index >= 0 && points[index] === null) index -= 1;
  return index;
}

const x = (index, length) => Math.round((index / Math.max(1, length - 1)) * WIDTH * 10) / 10;

/** Return the runs of known points, as coordinates: where nobody joined there is no line. */
function runsOf(points, highest) {
  const y = (point) => HEIGHT - MARGIN - (highest ? point / highest : 0) * (HEIGHT - 2 * MARGIN);
  const runs = [[]];
  points.forEach((point, index) => {
    if (point === null) runs.push([]);
    else runs.at(-1).push([x(index, points.length), Math.round(y(point) * 10) / 10]);
  });
  return runs.filter((run) => run.length);
}

/** Return the path through the coordinates; a single one becomes a dot, which the round line caps draw. */
const outline = ([first, ...rest]) => `M${first}${rest.map((point) => `L${point}`).join("") || "h0.1"}`;
