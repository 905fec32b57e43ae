/** The numbers on a statechart: the connections in each state now, and for how long a state has been stuck. */

import { setText, svg } from "./dom.js";
import { formatAmount, formatCount } from "./numbers.js";
import { formatDuration } from "./times.js";

// Units of the drawing. The count stands in the upper right corner of the box; the mark of a stuck state sits on the
// upper edge and beyond that corner, because a transition ends in the middle of the edge.
const COUNT_INSET = 10;
const COUNT_BASELINE = 22;
const MARK_HEIGHT = 16;
const MARK_PADDING = 6;
const MARK_OVERHANG = 10;

/**
 * Prepare a chart for numbers.
 * @param {import("./chart.js").Chart} chart
 * @returns {(states: {state: string, count: number, longest: number|null, is_stuck: boolean}[]) => void} shows them
 */
export function chartCounts(chart) {
  const labels = new Map([...chart.states].map(([name, group]) => [name, addLabel(group)]));
  const name = chart.drawing.getAttribute("aria-label");
  return (states) => {
    for (const state of states) {
      const label = labels.get(state.state);
      if (label) showState(label, state);
    }
    chart.drawing.setAttribute("aria-label", `${name}. ${states.map(describe).join("; ")}`);
  };
}

function addLabel(group) {
  const box = group.querySelector("path").getBBox();
  const edge = box.x + box.width;
  const right = edge + MARK_OVERHANG; // of the mark
  const count = svg("text", {
    class: "chart-count",
    x: edge - COUNT_INSET,
    y: box.y + COUNT_BASELINE,
    "text-anchor": "end",
  });
  const back = svg("rect", {
    class: "stuck-back",
    y: box.y - MARK_HEIGHT / 2,
    height: MARK_HEIGHT,
    rx: MARK_HEIGHT / 2,
  });
  const text = svg("text", { class: "stuck-text", x: right - MARK_PADDING, y: box.y + 3.5, "text-anchor": "end" });
  const mark = svg("g", { class: "stuck-mark" }, back, text);
  group.append(count, mark);
  return { group, count, back, text, right };
}

function showState({ group, count, back, text, right }, state) {
  group.classList.toggle("is-occupied", state.count > 0);
  group.classList.toggle("is-stuck", state.is_stuck);
  setText(count, formatCount(state.count));
  const words = state.is_stuck ? `▲ stuck ${formatDuration(state.longest)}` : "";
  if (text.textContent === words) return;
  text.textContent = words;
  const width = text.getComputedTextLength() + 2 * MARK_PADDING;
  back.setAttribute("x", right - width);
  back.setAttribute("width", width);
}

function describe({ state, count, longest, is_stuck: isStuck }) {
  const stuck = isStuck ? `, stuck for ${formatDuration(longest)}` : "";
  return `${state}: ${formatAmount(count, "connection")}${stuck}`;
}
