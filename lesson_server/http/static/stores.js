/** RDS, Redis and Mixpanel: whether each answers, when it last failed, and why. */

import { setMark } from "./cells.js";
import { html, setText } from "./dom.js";
import { updateChildren } from "./keyed.js";
import { makeTime, setAge, setTime } from "./times.js";

const LEVELS = { up: "good", down: "bad", off: "neutral" };
const WORDS = { up: "Up", down: "Down", off: "Off" };

/**
 * Show the stores.
 * @param {Element} list
 * @param {{name: string, status: string, failed_at: string|null, cause: string|null}[]} stores
 */
export function showStores(list, stores) {
  updateChildren(list, stores, { key: ({ name }) => name, create, update });
}

function create({ name }) {
  return html(
    "li",
    { class: "store" },
    html("span", { class: "store-name" }, name),
    html("span"),
    html(
      "p",
      { class: "store-failure" },
      html("span", { class: "store-since" }),
      makeTime(),
      html("span", {}, " (", html("span", { class: "store-age" }), ")"),
      html("span", { class: "store-cause" }),
    ),
  );
}

function update(item, { status, failed_at: failedAt, cause }) {
  const [, mark, failure] = item.children;
  const [label, time, age, reason] = failure.children;
  setMark(mark, LEVELS[status] ?? "neutral", WORDS[status] ?? status);
  if (failedAt === null) {
    setText(label, status === "off" ? "Not configured" : "No failure seen");
  } else {
    setText(label, "Last failed ");
    setTime(time, failedAt);
    setAge(age.querySelector(".store-age"), failedAt);
  }
  time.hidden = age.hidden = failedAt === null;
  setText(reason, cause ? `: ${cause}` : "");
}
