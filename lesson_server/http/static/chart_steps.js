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

  /** Take all marks away, but for the one of the state that the connection is in. */
  clear() {
    this.reset(this.#state);
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
   * @param {{trigger: string, step: string, seconds: number, error: string|null}} step
   * @returns {import("./chart.js").Transition|null} the transition that the step is of
   */
  step({ trigger, step, seconds, error }) {
    if (this.#transition?.trigger !== trigger) {
      this.#transition = this.chart.transitions.find((t) => t.source === this.#state && t.trigger === trigger) ?? null;
      this.#done = 0;
    }
    const steps = this.#transition?.steps ?? [];
    const at = steps.findIndex(({ name }, index) => index >= this.#done && name === step);
    if (at < 0) return null;
    this.#done = at + 1;
    const { text } = steps[at];
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
}
