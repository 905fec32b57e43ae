/**
 * The seats of a lesson: a grid of cells, each made once and then only changed.
 *
 * A grid for the keyboard and for screen readers: one stop for Tab, then arrows, Home, End, Page Up and Page Down. A
 * lesson may have 10,000 seats: each row is rendered only when it is in view (content-visibility in seat_grid.css).
 */

import { html, setAttribute, setText } from "./dom.js";
import { formatAmount, formatCount } from "./numbers.js";

// Seats up to which a cell has room for its number and its occupant's name.
const ROOMY = 120;
// Pixels that a cell takes with its gap, at least.
const CELL_WIDTH = { roomy: 92, compact: 18 };
const LABEL_WIDTH = 56;
// Compact rows have a multiple of this many seats, so that a seat is found by its number.
const COMPACT_COLUMNS = 10;
// Rows that Page Up and Page Down move by.
const PAGE_ROWS = 10;

/** The seat grid of one lesson. */
export class SeatGrid {
  #cells = new Map(); // seat number → its cell, in the order of the seats
  #numbers = []; // the seat numbers, in order
  #isRoomy = true;
  #columns = 0;
  #current = null; // the cell that Tab leads to
  #readCell = null; // the cell that the readout shows

  /**
   * @param {HTMLElement} grid with role="grid"
   * @param {HTMLElement} readout shows the seat that the pointer or the keyboard is on
   */
  constructor(grid, readout) {
    this.grid = grid;
    this.readout = readout;
    grid.addEventListener("keydown", (event) => this.#onKey(event));
    grid.addEventListener("focusin", (event) => {
      this.#select(event.target);
      this.#read(event.target);
    });
    grid.addEventListener("pointerover", (event) => {
      const cell = cellOf(event.target);
      if (cell) this.#read(cell);
    });
    grid.addEventListener("click", (event) => cellOf(event.target)?.focus());
    new ResizeObserver(() => this.#arrange()).observe(grid.parentElement);
  }

  /**
   * Show who sits where.
   * @param {Record<string, string>} seats seat number → occupant, or "" when the seat is free
   * @param {Set<string>} away the seats that are kept for occupants who are not in the lesson
   */
  show(seats, away) {
    const numbers = Object.keys(seats); // integer-like keys of an object are in ascending order
    const isOther =
      numbers.length !== this.#numbers.length || numbers.some((number, at) => number !== this.#numbers[at]);
    if (isOther) this.#make(numbers);
    for (const number of numbers) showOccupant(this.#cells.get(number), seats[number], away.has(number));
    this.#read(this.#readCell);
  }

  #make(numbers) {
    const isRoomy = numbers.length <= ROOMY;
    const old = isRoomy === this.#isRoomy ? this.#cells : new Map();
    this.#numbers = numbers;
    this.#isRoomy = isRoomy;
    this.#cells = new Map(numbers.map((number) => [number, old.get(number) ?? createCell(number, isRoomy)]));
    if (!this.#has(this.#readCell)) this.#readCell = null;
    if (!this.#has(this.#current)) this.#select(this.#cells.values().next().value ?? null);
    this.#columns = 0;
    this.#arrange();
  }

  /** Put the cells into rows as wide as the page; done again only when the number of columns changes. */
  #arrange() {
    const width = this.grid.parentElement.clientWidth;
    const columns = this.#isRoomy
      ? Math.max(2, Math.floor(width / CELL_WIDTH.roomy))
      : Math.max(1, Math.floor((width - LABEL_WIDTH) / CELL_WIDTH.compact / COMPACT_COLUMNS)) * COMPACT_COLUMNS;
    if (columns === this.#columns || width === 0) return;
    this.#columns = columns;
    const cells = [...this.#cells.values()];
    const focused = this.grid.contains(document.activeElement) ? document.activeElement : null;
    const rows = [];
    for (let first = 0; first < cells.length; first += columns) {
      const label = html("span", { role: "rowheader", class: "seat-row-label" }, this.#numbers[first]);
      rows.push(
        html(
          "div",
          { role: "row", class: "seat-row" },
          ...(this.#isRoomy ? [] : [label]),
          ...cells.slice(first, first + columns),
        ),
      );
    }
    this.grid.classList.toggle("is-compact", !this.#isRoomy);
    this.grid.style.setProperty("--columns", String(columns));
    this.grid.replaceChildren(...rows);
    focused?.focus({ preventScroll: true });
  }

  #has(cell) {
    return cell !== null && this.#cells.get(cell.dataset.seat) === cell;
  }

  #select(cell) {
    if (this.#current) this.#current.tabIndex = -1;
    this.#current = cell;
    if (cell) cell.tabIndex = 0;
  }

  #read(cell) {
    this.#readCell = cell;
    setText(this.readout, cell ? describe(cell) : "");
  }

  #onKey(event) {
    const at = this.#numbers.indexOf(this.#current?.dataset.seat);
    const columns = this.#columns;
    const rowStart = at - (at % columns);
    const last = this.#numbers.length - 1;
    const moves = {
      ArrowRight: at + 1,
      ArrowLeft: at - 1,
      ArrowDown: at + columns,
      ArrowUp: at - columns,
      PageDown: Math.min(last, at + PAGE_ROWS * columns),
      PageUp: Math.max(0, at - PAGE_ROWS * columns),
      Home: event.ctrlKey ? 0 : rowStart,
      End: event.ctrlKey ? last : Math.min(last, rowStart + columns - 1),
    };
    if (!(event.key in moves)) return;
    event.preventDefault();
    this.#cells.get(this.#numbers[moves[event.key]])?.focus();
  }
}

const cellOf = (element) => element.closest("[role=gridcell]");

function createCell(number, isRoomy) {
  const cell = html("span", { role: "gridcell", class: "seat", tabindex: "-1", "data-seat": number });
  if (isRoomy) {
    const mark = html("span", { class: "seat-away" });
    cell.append(html("span", {}, number, " ", mark), " ", html("span", { class: "seat-occupant" }));
  }
  return cell;
}

function showOccupant(cell, occupant, isAway) {
  if (cell.dataset.occupant === occupant && cell.classList.contains("is-away") === isAway) return;
  cell.dataset.occupant = occupant;
  cell.classList.toggle("is-taken", occupant !== "");
  cell.classList.toggle("is-away", isAway);
  setAttribute(cell, "title", occupant ? describe(cell) : null);
  if (cell.lastChild) {
    setText(cell.lastChild, occupant || "free");
    setText(cell.querySelector(".seat-away"), isAway ? "away" : "");
  } else setAttribute(cell, "aria-label", describe(cell));
}

function describe(cell) {
  const away = cell.classList.contains("is-away") ? ", away" : "";
  return `Seat ${cell.dataset.seat}: ${cell.dataset.occupant || "free"}${away}`;
}

/**
 * Say how full a lesson is.
 * @param {number} taken
 * @param {number} seats
 * @param {number} away so many of those taken are kept for people who are not in the lesson
 */
export function describeSeats(taken, seats, away) {
  if (!seats) return "This lesson has no seats.";
  const kept = away ? `, ${formatCount(away)} of them kept for people who are away` : "";
  return `${formatAmount(seats, "seat")}, ${formatCount(taken)} taken${kept}`;
}
