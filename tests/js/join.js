// Joins a lesson with the official client and prints, as one line of JSON, what the client saw.
// Usage: node join.js URL '{"auth": {...}, "transports": [...], "joins": 1}'
const { io } = require("socket.io-client");

const [url, options] = [process.argv[2], JSON.parse(process.argv[3])];
const socket = io(url, { auth: options.auth, transports: options.transports, reconnection: false });
const seen = { answers: [] };

function finish() {
  console.log(JSON.stringify(seen));
  socket.disconnect();
}

socket.on("connect_error", (error) => {
  seen.connect_error = error.message;
  finish();
});

socket.on("connect", async () => {
  const joins = Array.from({ length: options.joins }, () => socket.timeout(10000).emitWithAck("join_lesson"));
  seen.answers = await Promise.all(joins);
  if (options.transports.length > 1 && socket.io.engine.transport.name === "polling") {
    await new Promise((resolve) => socket.io.engine.once("upgrade", resolve));
    seen.answers.push(await socket.timeout(10000).emitWithAck("join_lesson"));
  }
  seen.transport = socket.io.engine.transport.name;
  finish();
});
