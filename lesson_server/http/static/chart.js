/** The drawing of a statechart, as Graphviz made it for the docs, inline in the page, so that parts can be marked. */

import { setText } from "./dom.js";

// What the drawing calls a transition: source and destination, each perhaps with the side of the box where it ends.
const EDGE = /^(\w+)(?::\w+)?->(\w+)(?::\w+)?$/;
// The pseudostate from which the initial state is entered.
const START = "start";
// Transitions that are not on the path of the event. statecharts/export.py draws them in other colours.
const OFF_PATH = ["abandon", "restore", "remove", "disconnect"];

/**
 * @typedef {object} Transition
 * @property {string} source
 * @property {string} target
 * @property {string} trigger
 * @property {"path"|"abandon"|"restore"|"remove"|"disconnect"} kind
 * @property {{name: string, text: SVGTextElement}[]} steps in their order
 * @property {SVGGElement} group
 */

/** A statechart on the page. */
export class Chart {
  /**
   * @param {SVGSVGElement} drawing
   * @param {string} event
   * @param {string} client
   */
  constructor(drawing, event, client) {
    this.drawing = drawing;
    this.event = event;
    this.client = client;
    /** @type {Map<string, SVGGElement>} state → its group in the drawing */
    this.states = new Map();
    /** @type {Transition[]} */
    this.transitions = [];
    for (const group of drawing.querySelectorAll("g.node")) this.#readState(group);
    for (const group of drawing.querySelectorAll("g.edge")) this.#readTransition(group);
  }

  /**
   * Where the drawing is wider than its place, show the states in the middle first, not the transitions beside them.
   */
  showStates() {
    const place = this.drawing.parentElement;
    const state = this.drawing.querySelector("g.node").getBoundingClientRect();
    const visible = place.getBoundingClientRect();
    place.scrollLeft += (state.left + state.right - visible.left - visible.right) / 2;
  }

  /**
   * Return the transition that leads on from a state, on the path of the event.
   * @param {string} state
   * @returns {Transition|undefined}
   */
  next(state) {
    return this.transitions.find(({ source, kind }) => source === state && kind === "path");
  }

  #readState(group) {
    const name = group.querySelector("title").textContent;
    if (name === START) group.classList.add("chart-start");
    else this.states.set(name, group);
  }

  #readTransition(group) {
    const title = group.querySelector("title");
    const [, source, target] = title.textContent.match(EDGE);
    if (source === START) {
      this.initial = target;
      return;
    }
    const [heading, ...steps] = group.querySelectorAll("text");
    const [trigger] = heading.textContent.split(" ");
    const kind = OFF_PATH.includes(trigger) ? trigger : "path";
    group.classList.add(`transition-${kind}`);
    setText(title, `${trigger}: from ${source} to ${target}`);
    const named = steps.map((text) => ({ name: text.textContent, text }));
    this.transitions.push({ source, target, trigger, kind, steps: named, group });
  }
}

/**
 * Fetch a statechart's drawing into its figure.
 * @param {HTMLElement} figure with data-event and data-client, and a child .chart-drawing
 * @returns {Promise<Chart|null>} null when there is no drawing, which the figure then says
 */
export async function loadChart(figure) {
  const { event, client } = figure.dataset;
  const place = figure.querySelector(".chart-drawing");
  const response = await fetch(`/console/charts/${event}/${client}.svg`).catch(() => null);
  if (!response?.ok) {
    setText(place, "The drawing could not be loaded. Reload the page to try again.");
    return null;
  }
  const file = new DOMParser().parseFromString(await response.text(), "image/svg+xml");
  const drawing = document.importNode(file.documentElement, true);
  // The drawings use the same ids, and nothing refers to them.
  for (const element of drawing.querySelectorAll("[id]")) element.removeAttribute("id");
  // So that all drawings have the same scale.
  drawing.style.setProperty("--points", String(drawing.viewBox.baseVal.width));
  drawing.setAttribute("role", "img");
  drawing.setAttribute("aria-label", `Statechart of ${event}, ${client}`);
  place.replaceChildren(drawing);
  const chart = new Chart(drawing, event, client);
  chart.showStates();
  return chart;
}
