/** One connection of the page "Try a join": its token, its Socket.IO connection, its events, the reports of its steps. */

const CLIENT_MODULE = "/try/socket.io.esm.min.js";
// Milliseconds; the server answers every event within 5 s.
const ANSWER_TIMEOUT = 6_000;
// Milliseconds to wait for the stream of steps before joining without it.
const READY_TIMEOUT = 4_000;
// What the server sends to the client and the steps come over two connections. Milliseconds in which the last step
// arrives.
const SETTLING = 400;

/**
 * @typedef {object} Reports what a trial calls as it goes on
 * @property {(sentence: string) => void} onFailure there is no connection, and why
 * @property {() => void} onConnect
 * @property {(step: {event: string, trigger: string, step: string, seconds: number, error: string|null}) => void} onStep
 * @property {(reached: {event: string, state: string}) => void} onState
 * @property {(answer: object) => void} onAnswer
 * @property {(name: string, data: object) => void} onServerEvent
 * @property {(sentence: string) => void} onDisconnect
 */

/** The event with which each connection begins. */
export const JOIN = "join_lesson";

/** A connection that joins a lesson, and then emits what it is told to. */
export class Trial {
  #socket = null;
  #steps = null;
  #isEnded = false;

  /** @param {Reports} reports */
  constructor(reports) {
    this.reports = reports;
  }

  /**
   * Get a token, connect, and join.
   * @param {{client: string, lesson_id: string, name: string}} who
   */
  async start(who) {
    const [io, auth] = await Promise.all([loadClient(), fetchAuth(who)]).catch((error) => {
      this.#report("onFailure", error.message);
      return [];
    });
    if (!io || this.#isEnded) return;
    this.#socket = io({ auth, transports: ["websocket"], reconnection: false, forceNew: true });
    this.#socket.on("connect_error", (error) => this.#report("onFailure", error.message));
    this.#socket.on("disconnect", (reason) => this.#onDisconnect(reason));
    this.#socket.onAny((name, data) => setTimeout(() => this.#report("onServerEvent", name, data), SETTLING));
    this.#socket.on("connect", () => {
      this.#report("onConnect");
      this.#followSteps();
    });
  }

  /**
   * Emit an event without data, and report its acknowledgement after the steps.
   * @param {string} event
   */
  async emit(event) {
    const answer = await this.#socket
      .timeout(ANSWER_TIMEOUT)
      .emitWithAck(event)
      .catch((error) => ({ error: error.message }));
    setTimeout(() => this.#report("onAnswer", answer), SETTLING);
  }

  /** Disconnect, and go on reporting until the connection has ended. */
  disconnect() {
    this.#socket?.disconnect();
  }

  /** Disconnect, and report nothing more. */
  end() {
    this.#isEnded = true;
    this.#steps?.close();
    this.disconnect();
  }

  #report(name, ...values) {
    if (!this.#isEnded) this.reports[name](...values);
  }

  #followSteps() {
    const join = once(() => this.#socket.connected && this.emit(JOIN));
    this.#steps = new EventSource(`/try/steps?sid=${encodeURIComponent(this.#socket.id)}`);
    this.#steps.addEventListener("ready", join);
    this.#steps.addEventListener("error", join); // then the join goes on without reports
    this.#steps.addEventListener("step", (event) => this.#report("onStep", JSON.parse(event.data)));
    this.#steps.addEventListener("state", (event) => this.#report("onState", JSON.parse(event.data)));
    setTimeout(join, READY_TIMEOUT);
  }

  #onDisconnect(reason) {
    const isOurs = reason === "io client disconnect";
    setTimeout(() => {
      this.#steps?.close();
      this.#report("onState", { event: JOIN, state: "disconnected" });
      this.#report("onDisconnect", isOurs ? "Disconnected." : `The server closed the connection (${reason}).`);
    }, SETTLING);
  }
}

async function loadClient() {
  try {
    return (await import(CLIENT_MODULE)).io;
  } catch {
    throw new Error("The Socket.IO client could not be loaded. Reload the page to try again.");
  }
}

async function fetchAuth(who) {
  const body = JSON.stringify(who);
  const headers = { "Content-Type": "application/json" };
  const response = await fetch("/try/token", { method: "POST", headers, body }).catch(() => null);
  if (response === null) throw new Error("The server does not answer.");
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.error ?? `The server answered with status ${response.status}.`);
  return answer.auth;
}

function once(call) {
  let isCalled = false;
  return () => {
    if (!isCalled) call();
    isCalled = true;
  };
}
