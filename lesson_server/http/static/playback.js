/** Plays what has been reported one after the other, slowly enough to be seen: a join takes about a millisecond. */

import { prefersReducedMotion } from "./dom.js";

// Milliseconds between one item and the next.
const PACE = 250;

/** A queue of things to show. */
export class Playback {
  #queue = [];
  #isPlaying = false;

  /**
   * Show something after all that came before.
   * @param {() => void} show
   */
  add(show) {
    this.#queue.push(show);
    if (!this.#isPlaying) this.#play();
  }

  /** Forget what has not been shown. */
  clear() {
    this.#queue = [];
  }

  async #play() {
    this.#isPlaying = true;
    while (this.#queue.length) {
      this.#queue.shift()();
      if (!prefersReducedMotion()) await new Promise((resolve) => setTimeout(resolve, PACE));
    }
    this.#isPlaying = false;
  }
}
