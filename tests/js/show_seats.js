// Runs the example of docs/events/seat_changed.md with the official client, and prints each map that the example shows
// as one line of JSON. A line "reconnect" on stdin loses the connection; the client then connects again.
// Usage: node show_seats.js URL '{"auth": {...}, "page": "docs/events/seat_changed.md", "token": "of the roster API"}'
const { readFileSync } = require("fs");
const { createInterface } = require("readline");
const { io } = require("socket.io-client");

const [url, options] = [process.argv[2], JSON.parse(process.argv[3])];
const blocks = [...readFileSync(options.page, "utf8").matchAll(/```js\n(.*?)```/gs)];
const example = new Function("socket", "fetch", "draw", blocks.at(-1)[1]);
const socket = io(url, { auth: options.auth, transports: ["websocket"], reconnectionDelay: 50 });

// In place of the platform's back end.
async function seatsOfBackEnd() {
  const headers = { Authorization: `Bearer ${options.token}` };
  const answer = await fetch(`${url}/api/lessons/${options.auth.lesson_id}`, { headers });
  const { seats } = await answer.json();
  return { json: () => seats };
}

example(socket, seatsOfBackEnd, (seats) => console.log(JSON.stringify(seats)));
createInterface({ input: process.stdin })
  .on("line", () => socket.io.engine.close())
  .on("close", () => process.exit());
