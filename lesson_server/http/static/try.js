/** The page "Try a join": a form, the chart whose steps light up, the acknowledgement. */

import { loadChart } from "./chart.js";
import { ChartSteps } from "./chart_steps.js";
import { html, setText } from "./dom.js";
import { formatMilliseconds } from "./numbers.js";
import { Playback } from "./playback.js";
import { JOIN, Trial } from "./trial.js";

const part = (id) => document.getElementById(id);
const form = part("try-form");
const status = part("try-status");
const log = part("try-log");
const answerPart = part("try-answer");
const playback = new Playback();
const figures = [...document.querySelectorAll(".chart")];
const events = [...new Set(figures.map((figure) => figure.dataset.event))];
const charts = new Map(figures.map((figure) => [nameOf(figure.dataset), loadChart(figure)]));

let trial = null;
let chartSteps = new Map(); // event → the steps on the chart of the event
let tried = JOIN; // the event whose steps the log and the chart show
let state = null; // of the join, as shown, which may be later than as reported
let logged = null; // the transition whose steps the log shows last

function nameOf({ event, client }) {
  return `${event} ${client}`;
}

// A guest is a participant without an access token.
function chosenClient() {
  const client = form.elements.client.value;
  return client === "guest" ? "participant" : client;
}

function showClient() {
  showChart();
  const isGuest = form.elements.client.value === "guest";
  // form.elements, because a form has properties of its own, such as `name`.
  const { name } = form.elements;
  name.closest(".field").hidden = isGuest;
  name.required = !isGuest;
}

async function showChart() {
  const shown = nameOf({ event: tried, client: chosenClient() });
  for (const figure of figures) figure.hidden = nameOf(figure.dataset) !== shown;
  (await charts.get(shown))?.showStates();
}

async function start() {
  trial?.end();
  playback.clear();
  const { client, lesson, name } = form.elements;
  const loaded = events.map(async (event) => [event, await charts.get(nameOf({ event, client: chosenClient() }))]);
  chartSteps = new Map(
    (await Promise.all(loaded)).filter(([, chart]) => chart).map(([event, chart]) => [event, new ChartSteps(chart)]),
  );
  show(JOIN);
  state = null;
  trial = new Trial(reports);
  setText(status, "Connecting…");
  setControls("connecting");
  trial.start({ client: client.value, lesson_id: lesson.value, name: client.value === "guest" ? "" : name.value });
}

const reports = {
  onFailure: (sentence) => {
    setControls("none");
    setText(status, sentence);
    status.classList.add("failure");
  },
  onConnect: () => {
    setControls("connected");
    for (const steps of chartSteps.values()) steps.reset(steps.chart.initial);
    state = chartSteps.get(JOIN)?.chart.initial ?? "connected";
    setText(status, "Joining…");
  },
  onStep: (step) => playback.add(() => showStep(step)),
  onState: (reached) => playback.add(() => showState(reached)),
  onAnswer: (answer) => playback.add(() => showAnswer(answer)),
  onServerEvent: (name, data) => playback.add(() => showServerEvent(name, data)),
  onDisconnect: (sentence) => playback.add(() => setText(status, sentence)),
};

/** Empty the log, and show the chart of an event with the state that it is in. */
function show(event) {
  tried = event;
  logged = null;
  status.classList.remove("failure");
  log.replaceChildren();
  answerPart.hidden = true;
  chartSteps.get(event)?.clear();
  showChart();
}

function setControls(connection) {
  part("try-connected").hidden = connection !== "connected";
  part("try-join").ariaDisabled = String(connection === "connecting");
}

function showStep(step) {
  const transition = chartSteps.get(step.event)?.step(step) ?? null;
  if (transition !== logged && transition !== null) {
    addToLog(html("li", { class: "log-transition" }, html("code", {}, transition.trigger)));
  }
  logged = transition;
  const item = html("li", { class: step.error === null ? "log-step" : "log-step is-failed" });
  item.append(html("code", {}, step.step), html("span", {}, formatMilliseconds(step.seconds * 1000)));
  if (step.error !== null) item.append(html("span", { class: "failure" }, step.error));
  addToLog(item);
}

function showState(reached) {
  chartSteps.get(reached.event)?.move(reached.state);
  if (reached.event !== JOIN || reached.state === state) return; // the other events do not change the state
  state = reached.state;
  logged = null;
  addToLog(html("li", { class: "log-state" }, "State ", html("code", {}, state)));
  if (state === "disconnected") setControls("none");
}

function showServerEvent(name, data) {
  addToLog(html("li", { class: "log-event" }, html("code", {}, name), html("code", {}, JSON.stringify(data))));
}

function addToLog(item) {
  log.append(item);
  log.scrollTop = log.scrollHeight;
}

function showAnswer(answer) {
  if (!log.hasChildNodes())
    addToLog(html("li", {}, "The server reported no step. A connection that has joined makes none."));
  answerPart.hidden = false;
  setText(answerPart.querySelector("pre"), JSON.stringify(answer, null, 2));
  answerPart.classList.toggle("is-error", answer.status !== "SUCCESS");
  const result = answer.status === undefined ? `No acknowledgement: ${answer.error}` : `Acknowledged: ${answer.status}`;
  setText(status, `${result}. State: ${state}.`);
}

form.addEventListener("change", showClient);
form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (part("try-join").ariaDisabled !== "true") start();
});
for (const button of document.querySelectorAll("[data-emit]")) {
  button.addEventListener("click", () => {
    show(button.dataset.emit);
    setText(status, `Sent ${button.dataset.emit}…`);
    trial.emit(button.dataset.emit);
  });
}
part("try-disconnect").addEventListener("click", () => {
  if (tried !== JOIN) show(JOIN);
  trial.disconnect();
});
addEventListener("pagehide", () => trial?.end());
showClient();
