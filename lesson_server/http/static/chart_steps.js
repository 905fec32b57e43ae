/** The way of one connection through its statechart: the state that it is in, and the steps that have been done. */

import { svg } from "./dom.js";
import { formatMilliseconds } from "./numbers.js";

const MARKS = ["is-current", "is-passed", "is-done", "is-failed"];

/** Marks the steps and states of one connection on a chart. */
export class ChartSteps {
  #state;
  #transition = null; // the transition whose steps are being done
  #done = 0; // so many of its steps are done

  /** @param {import("./chart.js").Chart} chart */
  constructor(chart) {
    this.chart = chart;
    this.reset(null);
  }

  /**
   * Take all marks away, and mark the state that the connection is in.
   * @param {string|null} state
   */
  reset(state) {
    for (const mark of MARKS) {
      for (const element of this.chart.drawing.querySelectorAll(`.${mark}`)) element.classList.remove(mark);
    }
    for (const result of this.chart.drawing.querySelectorAll(".step-result")) result.remove();
    this.#transition = null;
    this.#state = state;
    this.chart.states.get(state)?.classList.add("is-current");
    this.chart.drawing.classList.toggle("is-tried", state !== null);
  }

  /**
   * Mark a step as done or failed, with its duration.
   * @param {{step: string, seconds: number, error: string|null}} step
   * @returns {import("./chart.js").Transition|null} the transition that the step is of
   */
  step({ step, seconds, error }) {
    this.#find(step);
    if (!this.#transition) return null;
    const { text } = this.#transition.steps[this.#done - 1];
    this.#transition.group.classList.add("is-current");
    text.classList.add(error === null ? "is-done" : "is-failed");
    const isRoomy = this.#transition.kind === "path"; // beside the other transitions stand other things
    const result = error === null ? (isRoomy ? ` ✓ ${formatMilliseconds(seconds * 1000)}` : " ✓") : " ✗ failed";
    text.append(svg("tspan", { class: "step-result" }, result));
    return this.#transition;
  }

  /**
   * Mark the state that the connection is in now.
   * @param {string} state
   */
  move(state) {
    this.chart.states.get(this.#state)?.classList.replace("is-current", "is-passed");
    for (const { group } of this.chart.transitions) {
      if (group.classList.contains("is-current")) group.classList.replace("is-current", "is-passed");
    }
    this.chart.states.get(state)?.classList.remove("is-passed");
    this.chart.states.get(state)?.classList.add("is-current");
    this.#state = state;
    this.#transition = null;
  }

  /**
   * Find the transition that a step is of. A step's name may stand on several: the one that is being made goes first;
   * otherwise the step is the first one of a transition that leaves the present state.
   */
  #find(step) {
    const later = this.#transition?.steps.findIndex(({ name }, index) => index >= this.#done && name === step) ?? -1;
    if (later >= 0) {
      this.#done = later + 1;
      return;
    }
    const leaving = this.chart.transitions.filter(({ source }) => source === this.#state);
    this.#transition =
      leaving.find(({ steps }) => steps[0]?.name === step) ??
      leaving.find(({ steps }) => steps.some(({ name }) => name === step)) ??
      null;
    this.#done = (this.#transition?.steps.findIndex(({ name }) => name === step) ?? -1) + 1;
  }
}
