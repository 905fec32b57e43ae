/** Removing somebody from a lesson, asked twice: "Remove…" in the row, then a dialog that says what will happen. */

import { announce } from "./announce.js";
import { setText } from "./dom.js";

// The session has ended; the login page is the only thing that helps.
const UNAUTHORIZED = 401;
const LOGIN_PAGE = "/console/login";

/**
 * Make the dialog work.
 * @param {HTMLDialogElement} dialog
 * @param {string} lessonId
 * @returns {(kind: "teachers"|"participants", id: string) => void} asks whether to remove somebody
 */
export function removalDialog(dialog, lessonId) {
  const form = dialog.querySelector("form");
  const confirm = form.querySelector("[value=remove]");
  const failure = dialog.querySelector("[role=alert]");
  let path;
  let name;

  form.addEventListener("submit", async (event) => {
    if (event.submitter !== confirm) return; // Cancel closes the dialog by itself
    event.preventDefault();
    if (confirm.ariaDisabled === "true") return;
    confirm.ariaDisabled = "true";
    setText(failure, "");
    const problem = await remove(path);
    confirm.ariaDisabled = "false";
    setText(failure, problem ?? "");
    if (problem !== null) return;
    dialog.close();
    announce(`${name} was removed from lesson ${lessonId}.`);
  });

  return (kind, id) => {
    name = id;
    path = `/api/lessons/${encodeURIComponent(lessonId)}/${kind}/${encodeURIComponent(id)}`;
    for (const place of dialog.querySelectorAll(".person-name")) setText(place, id);
    setText(failure, "");
    dialog.showModal();
  };
}

/** Ask the server; return null when it is done, otherwise one sentence that says why not. */
async function remove(path) {
  const response = await fetch(path, { method: "DELETE" }).catch(() => null);
  if (response === null) return "The server does not answer. Nothing is known of the removal; look at the list.";
  if (response.ok) return null;
  if (response.status === UNAUTHORIZED) location.assign(LOGIN_PAGE);
  const answer = await response.json().catch(() => ({}));
  return answer.error ?? `The server answered with status ${response.status}.`;
}
