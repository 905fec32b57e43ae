/** Numbers as text, in the reader's notation. */

const whole = new Intl.NumberFormat(undefined, { maximumFractionDigits: 0 });
const oneDigit = new Intl.NumberFormat(undefined, { maximumFractionDigits: 1 });
const twoDigits = new Intl.NumberFormat(undefined, { maximumSignificantDigits: 2 });
const percent = new Intl.NumberFormat(undefined, { style: "percent", maximumFractionDigits: 0 });

/** @param {number} number */
export const formatCount = (number) => whole.format(number);

/** @param {number} share 0 to 1 */
export const formatShare = (share) => percent.format(share);

/** @param {number} rate per second */
export const formatRate = (rate) => (rate < 100 ? oneDigit : whole).format(rate);

/**
 * Format milliseconds with about two digits, because more are noise.
 * @param {number} milliseconds
 */
export function formatMilliseconds(milliseconds) {
  if (milliseconds >= 1000) return `${oneDigit.format(milliseconds / 1000)} s`;
  return `${(milliseconds < 10 ? twoDigits : whole).format(milliseconds)} ms`;
}

/**
 * Write a number with its noun.
 * @param {number} number
 * @param {string} noun in the singular; the plural takes an s
 */
export function formatAmount(number, noun) {
  return `${formatCount(number)} ${noun}${number === 1 ? "" : "s"}`;
}
