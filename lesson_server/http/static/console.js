/** The overview page. */

import { loadChart } from "./chart.js";
import { chartCounts } from "./chart_counts.js";
import { completeCommands } from "./commands.js";
import { showFigures } from "./figures.js";
import { DEFAULT_CHOICES, lessonsView } from "./lessons.js";
import { showNodes } from "./nodes.js";
import { formatMilliseconds, formatRate } from "./numbers.js";
import { findProblems, problemsView } from "./problems.js";
import { readQuery, writeQuery } from "./query.js";
import { showRefusals } from "./refusals.js";
import { sparkline } from "./sparkline.js";
import { showStates } from "./states_table.js";
import { showStores } from "./stores.js";
import { EventStream } from "./stream.js";
import { streamMark } from "./stream_mark.js";

const section = (id) => document.getElementById(id);

// The parts of the page

const drawings = new Map(); // event and client → Chart
const counts = new Map(); // event and client → function that shows the numbers on the chart
const showProblems = problemsView(section("problems"));
const sparklines = {
  joins: sparkline(section("rate-joins"), (rate) => `${formatRate(rate)}/s`, true),
  p50: sparkline(section("rate-p50"), formatMilliseconds, false),
  p99: sparkline(section("rate-p99"), formatMilliseconds, false),
};
let overview = null;

function showOverview(data) {
  overview = data;
  const refused = data.refusals.reduce((sum, { count }) => sum + count, 0);
  showFigures({ ...data, refused });
  showProblems(findProblems(data, drawings));
  for (const [name, show] of Object.entries(sparklines)) show(data.rates[name], data.rates.seconds);
  showStates(section("states").querySelector(".tables"), data.charts);
  showStores(section("stores").querySelector("ul"), data.stores);
  showRefusals(document.querySelector(".refusals"), data.refusals);
  showNodes(section("nodes"), data.nodes, data.at);
  showCounts();
}

function showCounts() {
  for (const { event, client, states } of overview?.charts ?? []) counts.get(`${event} ${client}`)?.(states);
}

async function addChart(figure) {
  const chart = await loadChart(figure);
  if (!chart) return;
  drawings.set(`${chart.event} ${chart.client}`, chart);
  counts.set(`${chart.event} ${chart.client}`, chartCounts(chart));
  showCounts();
}

// What the reader has chosen

const lessons = lessonsView(section("lessons"), choose);
const stream = new EventStream({ overview: showOverview, lessons: lessons.show }, streamMark());
let choices = readQuery(DEFAULT_CHOICES);

function choose(changes, isNewEntry) {
  choices = { ...choices, ...changes };
  writeQuery(choices, DEFAULT_CHOICES, isNewEntry);
  showChoices();
}

function showChoices() {
  lessons.showChoices(choices);
  stream.open(`/console/events?${new URLSearchParams(choices)}`);
}

addEventListener("popstate", () => {
  const previous = JSON.stringify(choices);
  choices = readQuery(DEFAULT_CHOICES);
  // Following a link within the page leads here too, and changes nothing.
  if (JSON.stringify(choices) !== previous) showChoices();
});

showChoices();
for (const figure of document.querySelectorAll(".chart")) addChart(figure);
completeCommands();
