/** What needs attention: what is stuck and why, which store is down, which node is silent. */

import { announce } from "./announce.js";
import { html, setText } from "./dom.js";
import { updateChildren } from "./keyed.js";
import { isSilent } from "./nodes.js";
import { formatAmount } from "./numbers.js";
import { formatDuration, formatTime, secondsSince } from "./times.js";

// Milliseconds without a problem after which it is announced again; otherwise one that comes and goes would chatter.
const FORGOTTEN = 60_000;

/**
 * @typedef {object} Problem
 * @property {string} key the same for the same problem, however its numbers change
 * @property {"bad"|"warning"} level
 * @property {string} title
 * @property {string} detail
 * @property {string} link to the part of the page that shows more
 */

/**
 * Make the section of the problems work.
 * @param {Element} section
 * @returns {(problems: Problem[]) => void}
 */
export function problemsView(section) {
  const seen = new Map(); // key → when the problem was last there
  return (problems) => {
    updateChildren(section.querySelector("ul"), problems, { key: ({ key }) => key, create, update });
    section.querySelector(".none").hidden = problems.length > 0;
    const now = Date.now();
    const news = problems.filter(({ key }) => now - (seen.get(key) ?? 0) > FORGOTTEN);
    for (const { key } of problems) seen.set(key, now);
    if (news.length) announce(news.map(({ title }) => title).join(". "));
  };
}

function create({ link, level }) {
  return html(
    "li",
    { class: `problem problem-${level}` },
    html("a", { href: link }),
    html("span", { class: "detail" }),
  );
}

function update(item, { title, detail }) {
  setText(item.firstChild, title);
  setText(item.lastChild, detail);
}

/**
 * Find what needs attention, the worst first.
 * @param {object} overview the data of the event `overview`
 * @param {Map<string, import("./chart.js").Chart>} drawings by event and client, as far as they are loaded
 * @returns {Problem[]}
 */
export function findProblems({ at, stores, nodes, charts }, drawings) {
  const down = stores.filter(({ status }) => status === "down").map(storeDown);
  const silent = nodes.filter((node) => isSilent(node, at)).map(nodeSilent);
  const stuck = charts.flatMap(({ event, client, states }) =>
    states
      .filter((state) => state.is_stuck)
      .map((state) => stateStuck(event, client, state, drawings.get(`${event} ${client}`))),
  );
  return [...down, ...silent, ...stuck];
}

function storeDown({ name, failed_at: failedAt, cause }) {
  const since = failedAt ? ` Last failed at ${formatTime(failedAt)}.` : "";
  return {
    key: `store ${name}`,
    level: "bad",
    title: `${name} is down`,
    detail: `${cause ?? "No cause known"}.${since}`,
    link: "#stores",
  };
}

function nodeSilent({ node, heard_of: heardOf, connections }) {
  const silence = formatDuration(secondsSince(heardOf));
  const detail = `Not heard of for ${silence}. It held ${formatAmount(connections, "connection")}.`;
  return { key: `node ${node}`, level: "bad", title: `Node ${node} is silent`, detail, link: "#nodes" };
}

function stateStuck(event, client, { state, count, longest }, drawing) {
  return {
    key: `state ${event} ${client} ${state}`,
    level: "warning",
    title: `${client} stuck in ${state} for ${formatDuration(longest)}`,
    detail: `${formatAmount(count, "connection")} in this state. ${whatIsMissing(event, state, drawing)}`,
    link: `#chart-${event}-${client}`,
  };
}

/** Say what has to happen before a connection leaves a state. */
function whatIsMissing(event, state, drawing) {
  const next = drawing?.next(state);
  if (!next) return "";
  const steps = next.steps.map(({ name }) => name).join(", ");
  const waiting = `${next.trigger} has not finished: ${steps}.`;
  return state === drawing.initial ? `The client has not sent ${event}, or ${waiting}` : waiting;
}
