/** The format of server-sent events: lines of "field: value", an empty line after each event; ":" begins a comment. */

/** Turns the chunks of a text/event-stream into events. */
export class EventParser {
  #buffer = "";
  #event = "";
  #data = [];

  /**
   * @param {(event: string, data: string) => void} onEvent
   * @param {(milliseconds: number) => void} onRetry called with the time to wait before a new connection
   */
  constructor(onEvent, onRetry) {
    this.onEvent = onEvent;
    this.onRetry = onRetry;
  }

  /** @param {string} chunk any part of the stream, in order */
  feed(chunk) {
    // A lone carriage return ends a line too, in the standard; this server does not send any.
    const lines = (this.#buffer + chunk).split(/\r?\n/);
    this.#buffer = lines.pop();
    lines.forEach((line) => this.#read(line));
  }

  #read(line) {
    if (line === "") return this.#dispatch();
    const colon = line.indexOf(":");
    if (colon === 0) return; // a comment
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (field === "event") this.#event = value;
    else if (field === "data") this.#data.push(value);
    else if (field === "retry" && /^\d+$/.test(value)) this.onRetry(Number(value));
  }

  #dispatch() {
    if (this.#data.length) this.onEvent(this.#event || "message", this.#data.join("\n"));
    this.#event = "";
    this.#data = [];
  }
}
