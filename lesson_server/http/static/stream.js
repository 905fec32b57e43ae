/**
 * The event stream of a page: opened, watched, and opened again by itself.
 *
 * Read with fetch, not with EventSource: EventSource hides the comment lines, which show that a silent stream is alive;
 * it does not notice a dead TCP connection; and it gives up for good at a status such as 502, which a proxy sends while
 * the server restarts.
 */

import { EventParser } from "./event_parser.js";
import { compareClocks } from "./times.js";

// The server sends something every second. Milliseconds of silence until the reader is told, and until the connection
// is replaced; the second is longer, so that a slow server is not asked again and again.
const SILENCE_TOLD = 4_000;
const SILENCE_ENDED = 10_000;
// Milliseconds between the end of a connection and the next, unless the server says another time.
const RETRY = 1_000;
// Milliseconds that a hidden page stays connected: long enough for a look at another tab. The console costs the server
// nothing while nobody looks.
const HIDDEN_ENDED = 30_000;

const LOGIN_PAGE = "/console/login";

/** @typedef {"live" | "lost"} Status */

/** One stream at a time, to one URL after the other. */
export class EventStream {
  #url = null;
  #connection = null; // the AbortController of the present attempt
  #heard = 0;
  #retry = RETRY;
  #hiddenTimer;

  /**
   * @param {Record<string, (data: any) => void>} handlers for each event by its name, called with its JSON
   * @param {(status: Status) => void} onStatus called when data come, and when none have come for too long
   */
  constructor(handlers, onStatus) {
    this.handlers = handlers;
    this.onStatus = onStatus;
    setInterval(() => this.#watch(), 1000);
    document.addEventListener("visibilitychange", () => this.#onVisibility());
    // A page with an open connection is not kept for Back, so the connection ends with the visit.
    addEventListener("pagehide", () => this.#end());
    addEventListener("pageshow", (event) => event.persisted && this.#begin());
  }

  /**
   * Replace the stream by one from another URL.
   * @param {string} url
   */
  open(url) {
    this.#url = url;
    this.#begin();
  }

  #begin() {
    this.#end();
    this.#connection = new AbortController();
    this.#heard = performance.now();
    this.#run(this.#connection.signal);
  }

  #end() {
    this.#connection?.abort();
    this.#connection = null;
  }

  async #run(signal) {
    try {
      await this.#read(signal);
    } catch (error) {
      if (!signal.aborted && !(error instanceof TypeError)) throw error; // a TypeError of fetch: no connection
    } finally {
      if (!signal.aborted) {
        this.onStatus("lost");
        setTimeout(() => signal.aborted || this.#begin(), this.#retry);
      }
    }
  }

  async #read(signal) {
    const response = await fetch(this.#url, { headers: { Accept: "text/event-stream" }, cache: "no-store", signal });
    if (response.status === 401) return this.#logIn();
    if (!response.ok) return;
    compareClocks(response.headers.get("Date"));
    const parser = new EventParser(
      (event, data) => this.handlers[event]?.(JSON.parse(data)),
      (milliseconds) => (this.#retry = milliseconds),
    );
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let chunk = await reader.read(); !chunk.done && !signal.aborted; chunk = await reader.read()) {
      this.#heard = performance.now();
      this.onStatus("live");
      parser.feed(chunk.value);
    }
  }

  #logIn() {
    this.#end();
    location.assign(LOGIN_PAGE);
  }

  #watch() {
    if (!this.#connection) return;
    const silence = performance.now() - this.#heard;
    if (silence > SILENCE_TOLD) this.onStatus("lost");
    if (silence > SILENCE_ENDED) this.#begin();
  }

  #onVisibility() {
    clearTimeout(this.#hiddenTimer);
    if (document.hidden) this.#hiddenTimer = setTimeout(() => this.#end(), HIDDEN_ENDED);
    else if (!this.#connection && this.#url) this.#begin();
  }
}
