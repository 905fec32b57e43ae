/** What a screen reader is told without being asked: rare and short. Everything else is read on demand. */

/**
 * Announce a sentence politely, in the region that base.html has for it.
 * @param {string} sentence
 */
export function announce(sentence) {
  document.getElementById("announcements").textContent = sentence;
}
