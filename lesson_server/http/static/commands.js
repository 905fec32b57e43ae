/** The commands that the page suggests to somebody new. */

import { html } from "./dom.js";

// The address that the simulators use unless they are told another.
const SIMULATORS_DEFAULT = "http://127.0.0.1:8080";

/** Give the commands of the simulators the address of this server, if they need it. */
export function completeCommands() {
  if (location.origin === SIMULATORS_DEFAULT) return;
  for (const script of document.querySelectorAll(".commands .script")) {
    script.after(" ", html("span", {}, "--url"), " ", html("span", {}, location.origin));
  }
}
