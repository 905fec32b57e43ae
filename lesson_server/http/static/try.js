/** The page "Try a join": a form, the chart whose steps light up, the acknowledgement. */

import { loadChart } from "./chart.js";
import { ChartSteps } from "./chart_steps.js";
import { html, setText } from "./dom.js";
import { formatMilliseconds } from "./numbers.js";
import { Playback } from "./playback.js";
import { Trial } from "./trial.js";

const part = (id) => document.getElementById(id);
const form = part("try-form");
const status = part("try-status");
const log = part("try-log");
const answerPart = part("try-answer");
const playback = new Playback();
const figures = [...document.querySelectorAll(".chart")];
const charts = new Map(figures.map((figure) => [figure.dataset.client, loadChart(figure)]));

let trial = null;
let chartSteps = null;
let state = null; // as shown, which may be later than as reported
let logged = null; // the transition whose steps the log shows last

// A guest is a participant without an access token.
const chartOf = (client) => (client === "guest" ? "participant" : client);

function showClient() {
  const client = form.elements.client.value;
  for (const figure of figures) figure.hidden = figure.dataset.client !== chartOf(client);
  // form.elements, because a form has properties of its own, such as `name`.
  const { name } = form.elements;
  name.closest(".field").hidden = client === "guest";
  name.required = client !== "guest";
}

async function start() {
  trial?.end();
  playback.clear();
  const { client, lesson, name } = form.elements;
  const chart = await charts.get(chartOf(client.value));
  chartSteps = chart && new ChartSteps(chart);
  clear(null);
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
    clear(chartSteps?.chart.initial ?? "connected");
    setText(status, "Joining…");
  },
  onStep: (step) => playback.add(() => showStep(step)),
  onState: (reached) => playback.add(() => showState(reached)),
  onAnswer: (answer) => playback.add(() => showAnswer(answer)),
  onDisconnect: (sentence) => playback.add(() => setText(status, sentence)),
};

function clear(initial) {
  state = initial;
  logged = null;
  status.classList.remove("failure");
  log.replaceChildren();
  answerPart.hidden = true;
  chartSteps?.reset(initial);
}

function setControls(connection) {
  part("try-connected").hidden = connection !== "connected";
  part("try-join").ariaDisabled = String(connection === "connecting");
}

function showStep(step) {
  const transition = chartSteps?.step(step) ?? null;
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
  if (reached === state) return;
  state = reached;
  logged = null;
  chartSteps?.move(reached);
  addToLog(html("li", { class: "log-state" }, "State ", html("code", {}, reached)));
  if (reached === "disconnected") setControls("none");
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
part("try-again").addEventListener("click", () => {
  clear(state);
  setText(status, "Joining again…");
  trial.join();
});
part("try-disconnect").addEventListener("click", () => trial.disconnect());
addEventListener("pagehide", () => trial?.end());
showClient();
