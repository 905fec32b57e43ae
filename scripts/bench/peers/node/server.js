// The two diagrams of the join, written down plainly on socket.io, pg and redis: see ../plain.py, which does the same.
// From the environment: PGHOST PGPORT PGUSER PGDATABASE BENCH_REDIS_SOCKET BENCH_KEY BENCH_PORT.

"use strict";

const http = require("node:http");
const jwt = require("jsonwebtoken");
const pg = require("pg");
const redis = require("redis");
const { Server } = require("socket.io");

const { BENCH_KEY, BENCH_PORT, BENCH_REDIS_SOCKET } = process.env;

const DAY = 24 * 60 * 60;
const RETENTION = 7 * DAY;

const rds = new pg.Pool({ max: 10 });
const store = redis.createClient({ socket: { path: BENCH_REDIS_SOCKET } });

const error = (message) => ({ status: "ERROR", message });

function verify(token) {
  const identity = jwt.verify(token, BENCH_KEY, { algorithms: ["HS256"] });
  if (!identity.exp || !identity.sub || !identity.role) throw new jwt.JsonWebTokenError("a claim is missing");
  return identity;
}

async function joinLesson(socket) {
  const auth = socket.handshake.auth;
  const lessonId = String(auth.lesson_id);

  // 2. to 4.: check_lesson_exists
  const { rowCount } = await rds.query("SELECT 1 FROM lessons WHERE id = $1", [lessonId]);
  if (rowCount === 0) return error(`lesson ${lessonId} not found`);
  let identity = null;
  if (auth.access_token) {
    try {
      identity = verify(auth.access_token);
    } catch (fault) {
      return error(fault instanceof jwt.TokenExpiredError ? "access token has expired" : "access token is invalid");
    }
  } else if (auth.client === "teacher") {
    return error("access token is required");
  }
  if (auth.client === "teacher" && identity.role !== "teacher") return error("only a teacher can join as teacher");

  // 5. to 9.: the room, the seat, the session
  await socket.join(lessonId);
  const { rows } = await rds.query("SELECT seat_count FROM lessons WHERE id = $1", [lessonId]);
  const seat = rows[0].seat_count;
  if (seat) socket.data.seat = seat;

  // 10. and 11.: the seat map
  const seatsKey = `lesson_seat_${lessonId}`;
  if (seat && !(await store.exists(seatsKey))) {
    const seats = {};
    for (let number = 1; number <= seat; number++) seats[number] = "";
    await store.hSet(seatsKey, seats);
    await store.expire(seatsKey, RETENTION);
  }

  if (auth.client === "teacher") {
    const userId = identity.sub;
    const teachersKey = `lesson_teacher_${lessonId}`;
    await store.hSet(teachersKey, userId, socket.id);
    await store.expire(teachersKey, DAY);
    await store.hSet(userId, "lesson_id", lessonId);
    await store.expire(userId, RETENTION);
  } else if (identity) {
    const { sub: clientId, role } = identity;
    socket.data.client_id = clientId;
    socket.data.role = role;
    if (await store.hExists(clientId, "sid")) reportReconnect(clientId, lessonId, role);
    await store.hSet(clientId, { sid: socket.id, client_id: clientId, role });
    await store.expire(clientId, DAY);
    const studentsKey = `lesson_student_${lessonId}`;
    await store.hSet(studentsKey, clientId, socket.id);
    await store.expire(studentsKey, RETENTION);
  }
  return { status: "SUCCESS", data: {} };
}

// Without a token of Mixpanel nothing is sent, in lesson-server as here.
function reportReconnect() {}

async function serve() {
  await store.connect();
  const server = http.createServer();
  const io = new Server(server);
  io.use((socket, next) => {
    const { client, lesson_id: lessonId } = socket.handshake.auth;
    const known = client === "teacher" || client === "participant";
    next(known && lessonId ? undefined : new Error("the handshake is wrong"));
  });
  io.on("connection", (socket) => {
    socket.on("join_lesson", async (...data) => {
      const answer = data.pop();
      try {
        answer(await joinLesson(socket));
      } catch (fault) {
        console.error(fault);
        answer(error("internal error"));
      }
    });
  });
  server.listen(Number(BENCH_PORT), "127.0.0.1", () => console.log("listening"));
}

serve();
