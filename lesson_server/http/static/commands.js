/** The commands that the page suggests to somebody new. */

// The address that the simulators use unless they are told another.
const SIMULATORS_DEFAULT = "http://127.0.0.1:8080";

/** Give the commands the address of this server, if they need it. */
export function completeCommands() {
  if (location.origin === SIMULATORS_DEFAULT) return;
  for (const place of document.querySelectorAll(".url-option")) place.textContent = ` --url ${location.origin}`;
}
