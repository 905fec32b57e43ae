/** The nodes, with their age and load. */

import { makeCell, makeHeading, makeRow, setBar } from "./cells.js";
import { html, setText } from "./dom.js";
import { updateChildren } from "./keyed.js";
import { formatAmount, formatCount, formatMilliseconds, formatShare } from "./numbers.js";
import { setAge } from "./times.js";

// A node sends a heartbeat every second. Seconds without one after which it is called silent: three may be late.
const SILENT = 4;
// Share of one core above which a node is called busy: its event loop has one core, and joins begin to wait.
const BUSY = 0.9;

/**
 * Return whether a node has been silent for too long, by the server's clock alone.
 * @param {{heard_of: string}} node
 * @param {string} at when the server looked
 */
export const isSilent = (node, at) => (Date.parse(at) - Date.parse(node.heard_of)) / 1000 > SILENT;

/**
 * Show the nodes.
 * @param {Element} section
 * @param {{node: string, connections: number, heard_of: string, started: string, cpu: number, lag: number}[]} nodes
 * @param {string} at when the server looked
 */
export function showNodes(section, nodes, at) {
  updateChildren(section.querySelector("tbody"), nodes, {
    key: ({ node }) => node,
    create: createRow,
    update: (row, node) => updateRow(row, node, at),
  });
  setText(section.querySelector(".panel-summary"), formatAmount(nodes.length, "node"));
}

function createRow({ node }) {
  return makeRow(
    makeHeading("Node", "identifier", html("code", {}, node)),
    makeCell("Connections", "number"),
    makeCell("CPU", "number", html("i", { class: "bar", "aria-hidden": "true" }), html("span")),
    makeCell("Loop late", "number"),
    makeCell("Heard of", "number", html("span")),
    makeCell("Started", "number", html("span")),
  );
}

function updateRow(row, node, at) {
  const [, connections, cpu, lag, heard, started] = row.cells;
  setText(connections, formatCount(node.connections));
  setText(cpu.lastChild, formatShare(node.cpu));
  setBar(cpu.firstChild, node.cpu);
  cpu.classList.toggle("is-warning", node.cpu >= BUSY);
  setText(lag, formatMilliseconds(node.lag * 1000));
  setAge(heard.firstChild, node.heard_of);
  heard.classList.toggle("is-warning", isSilent(node, at));
  setAge(started.firstChild, node.started);
}
