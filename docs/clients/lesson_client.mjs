// A client that stays in its lesson: it joins, joins again after each reconnect,
// and waits while the server is busy.
import { io } from "socket.io-client";

// What may succeed in a moment. Nothing else is tried again.
const RETRYABLE = new Set([
  "the lesson service is busy, try again",
  "the lesson service is unavailable, try again",
]);

// By chance, so that the clients of a class don't all come back in one moment:
// a second on average, then longer.
function pause(attempt) {
  const limit = Math.min(2_000 * 2 ** attempt, 30_000);
  return new Promise((resolve) => setTimeout(resolve, Math.random() * limit));
}

// who: { client: "participant", lesson_id: 42 }. getToken returns the access token,
// or null for a guest. onJoined gets the socket, each time that it has joined.
// onRefused gets the reason, and nothing is tried any more. Returns a function that
// leaves the lesson.
export function stayInLesson(url, who, getToken, onJoined, onRefused) {
  // Called before each connection: a token that has expired is replaced.
  const auth = async (send) => send({ ...who, access_token: await getToken() });
  const socket = io(url, { auth, transports: ["websocket", "polling"] });
  let attempt = 0;
  let left = false;

  // --8<-- [start:connect_error]
  socket.on("connect_error", async (error) => {
    if (socket.active) return;    // no network, or no server: it tries again
    if (!RETRYABLE.has(error.message)) return onRefused(error.message);
    await pause(attempt++);
    if (!left) socket.connect();  // after a refusal it does not
  });
  // --8<-- [end:connect_error]

  // --8<-- [start:join]
  socket.on("connect", async () => {    // also after each reconnect
    const connection = socket.id;
    while (socket.id === connection) {  // otherwise the next connection joins
      const answer = await join(socket);
      if (socket.id !== connection) return;
      if (answer.status === "SUCCESS") {
        attempt = 0;
        return onJoined(socket);
      }
      if (!RETRYABLE.has(answer.message)) {
        socket.disconnect();
        return onRefused(answer.message);
      }
      await pause(attempt++);
    }
  });
  // --8<-- [end:join]

  // --8<-- [start:removed]
  socket.on("disconnect", (reason) => {
    // For any other reason Socket.IO connects again by itself.
    if (reason === "io server disconnect") onRefused("removed from the lesson");
  });
  // --8<-- [end:removed]

  return () => {
    left = true;
    socket.disconnect();
  };
}

async function join(socket) {
  try {
    // The server answers within 5 s.
    return await socket.timeout(6_000).emitWithAck("join_lesson");
  } catch {  // no answer, or the connection is lost
    return { status: "ERROR", message: "the lesson service is unavailable, try again" };
  }
}
