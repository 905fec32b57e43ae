// Many official clients that join again whenever they have lost their connection. Each time that all have joined, prints
// as one line of JSON their sids of Socket.IO and of Engine.IO and the transports that they have come to. Fails when they
// have not after a minute.
// Usage: node crowd.js URL '{"lesson_id": …, "tokens": […], "transports": [...]}', until it is killed
const { io } = require("socket.io-client");

const [url, options] = [process.argv[2], JSON.parse(process.argv[3])];
const joined = new Map();

function report() {
  if (joined.size < options.tokens.length) return;
  const transports = {};
  for (const socket of joined.values()) {
    const name = socket.io.engine.transport.name;
    transports[name] = (transports[name] ?? 0) + 1;
  }
  const sockets = [...joined.values()];
  const [sids, engine_sids] = [sockets.map((socket) => socket.id), sockets.map((socket) => socket.io.engine.id)];
  console.log(JSON.stringify({ sids, engine_sids, transports }));
  patience.refresh();
}

const patience = setTimeout(() => {
  throw new Error(`${joined.size} of ${options.tokens.length} have joined`);
}, 60_000);

for (const access_token of options.tokens) {
  const auth = { client: "participant", lesson_id: options.lesson_id, access_token };
  const socket = io(url, { auth, transports: options.transports, forceNew: true, reconnectionDelay: 100 });
  socket.on("connect", async () => {
    const answer = await socket.timeout(10000).emitWithAck("join_lesson");
    if (answer.status !== "SUCCESS") throw new Error(answer.message);
    joined.set(access_token, socket);
    report();
  });
  socket.on("disconnect", (reason, details) => {
    console.error(reason, details?.message, details?.context?.responseText);
    joined.delete(access_token);
  });
  socket.io.engine.on("upgrade", report);
}
