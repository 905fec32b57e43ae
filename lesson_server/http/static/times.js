/** Times in the reader's zone, and ages by the server's clock. */

import { html, setAttribute, setText } from "./dom.js";

const clock = { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" };
const formatClock = new Intl.DateTimeFormat(undefined, clock);
const formatDay = new Intl.DateTimeFormat(undefined, { day: "numeric", month: "short", ...clock });
const formatYear = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });

const UNITS = [
  ["d", 86400],
  ["h", 3600],
  ["min", 60],
  ["s", 1],
];

// Seconds; an age below them is not counted: a number that changes all the time draws the eye for nothing.
const RECENT = 3;

// Milliseconds that the server's clock is ahead of the reader's.
let ahead = 0;
let areAgesRunning = true;

/**
 * Compare the clocks: without this a reader whose clock is wrong would see wrong ages.
 * @param {string|null} date the Date header of a response that has just come
 */
export function compareClocks(date) {
  const difference = Date.parse(date) - Date.now();
  // The header has whole seconds: a smaller difference is no difference.
  ahead = Math.abs(difference) > 2000 ? difference : 0;
}

/**
 * Return the seconds since a time, by the server's clock; never below 0.
 * @param {string} iso
 */
export function secondsSince(iso) {
  return Math.max(0, (Date.now() + ahead - Date.parse(iso)) / 1000);
}

/**
 * Write a time in the reader's zone: the time today, with the date when that is another.
 * @param {string|Date} time
 */
export function formatTime(time) {
  const date = new Date(time);
  const now = new Date();
  if (date.toDateString() === now.toDateString()) return formatClock.format(date);
  return (date.getFullYear() === now.getFullYear() ? formatDay : formatYear).format(date);
}

/**
 * Write a duration with about two digits: its largest unit, and the next one while the first is below ten.
 * @param {number} seconds
 */
export function formatDuration(seconds) {
  const index = UNITS.findIndex(([, length]) => seconds >= length);
  if (index < 0) return "0 s";
  const [unit, length] = UNITS[index];
  const count = Math.floor(seconds / length);
  const [smallerUnit, smallerLength] = UNITS[index + 1] ?? [];
  const rest = smallerUnit && count < 10 ? Math.floor((seconds % length) / smallerLength) : 0;
  return `${count} ${unit}${rest ? ` ${rest} ${smallerUnit}` : ""}`;
}

/**
 * Write how long ago something was.
 * @param {number} seconds
 */
export function formatAge(seconds) {
  return seconds < RECENT ? "just now" : `${formatDuration(seconds)} ago`;
}

/**
 * Make a <time>, to be filled by {@link setTime}.
 * @param {string} [className]
 */
export const makeTime = (className = "") => html("time", className ? { class: className } : {});

/**
 * Show a time in a <time>.
 * @param {Element} element
 * @param {string} iso
 */
export function setTime(element, iso) {
  setAttribute(element, "datetime", iso);
  setText(element, formatTime(iso));
}

/**
 * Show the age of something in an element, and keep it up to date while the element is on the page.
 * @param {Element} element
 * @param {string|null} iso when it began; null: show nothing
 */
export function setAge(element, iso) {
  setAttribute(element, "data-since", iso);
  setText(element, iso === null ? "" : formatAge(secondsSince(iso)));
}

/**
 * Let the ages grow, or let them stand: without news from the server nobody knows that nothing has happened since.
 * @param {boolean} isRunning
 */
export function runAges(isRunning) {
  areAgesRunning = isRunning;
}

function renewAges() {
  if (!areAgesRunning) return;
  for (const element of document.querySelectorAll("[data-since]")) {
    setText(element, formatAge(secondsSince(element.dataset.since)));
  }
}

setInterval(renewAges, 1000);
