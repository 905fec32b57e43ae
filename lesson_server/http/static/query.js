/** The view's choices live in the URL's query, so that a link can be shared and Back works. */

/**
 * Read the choices from the URL.
 * @template {Record<string, string>} Choices
 * @param {Choices} defaults every choice, with its value when the URL has none
 * @returns {Choices}
 */
export function readQuery(defaults) {
  const query = new URLSearchParams(location.search);
  return Object.fromEntries(Object.entries(defaults).map(([name, value]) => [name, query.get(name) ?? value]));
}

/**
 * Write the choices into the URL; those that have their default are left out.
 * @param {Record<string, string>} choices
 * @param {Record<string, string>} defaults
 * @param {boolean} isNewEntry whether Back leads to the choices before these
 */
export function writeQuery(choices, defaults, isNewEntry) {
  const changed = Object.entries(choices).filter(([name, value]) => value !== defaults[name]);
  const query = new URLSearchParams(changed).toString();
  const url = query ? `${location.pathname}?${query}` : location.pathname;
  if (isNewEntry) history.pushState(null, "", url);
  else history.replaceState(null, "", url);
}
