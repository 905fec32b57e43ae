// The two diagrams of the join, written down plainly on socket.io, for the peers on Node and on Bun, which bring their
// own clients of the stores: see plain.py, which does the same. From the environment: BENCH_KEY.

import { createHmac, createSecretKey, timingSafeEqual } from "node:crypto";

const DAY = 24 * 60 * 60;
const RETENTION = 7 * DAY;

const KEY = createSecretKey(Buffer.from(process.env.BENCH_KEY));

const error = (message) => ({ status: "ERROR", message });

const decoded = (part) => JSON.parse(Buffer.from(part, "base64url").toString());

// What a stranger sends need not be a token at all: then some step of this throws an error.
function genuineClaims(token) {
  const [header, payload, signature, ...more] = token.split(".");
  const expected = createHmac("sha256", KEY).update(`${header}.${payload}`).digest();
  const given = Buffer.from(signature, "base64url");
  const genuine = given.length === expected.length && timingSafeEqual(given, expected);
  if (!genuine || more.length > 0 || decoded(header).alg !== "HS256") throw new Error("not genuine");
  const { exp, sub, role } = decoded(payload);
  if (!Number.isFinite(exp) || !sub || !role) throw new Error("a claim is missing");
  return { exp, sub, role };
}

function verify(token) {
  let claims;
  try {
    claims = genuineClaims(token);
  } catch {
    throw new Error("access token is invalid");
  }
  if (claims.exp <= Date.now() / 1000) throw new Error("access token has expired");
  return claims;
}

async function joinLesson(socket, rds, store) {
  const auth = socket.handshake.auth;
  const lessonId = String(auth.lesson_id);

  // 2. to 4.: check_lesson_exists
  if (!(await rds.lessonExists(lessonId))) return error(`lesson ${lessonId} not found`);
  let identity = null;
  if (auth.access_token) {
    try {
      identity = verify(auth.access_token);
    } catch (fault) {
      return error(fault.message);
    }
  } else if (auth.client === "teacher") {
    return error("access token is required");
  }
  if (auth.client === "teacher" && identity.role !== "teacher") return error("only a teacher can join as teacher");

  // 5. to 9.: the room, the seat, the session
  await socket.join(lessonId);
  const seat = await rds.seatCount(lessonId);
  if (seat) socket.data.seat = seat;

  // 10. and 11.: the seat map
  const seatsKey = `lesson_seat_${lessonId}`;
  if (seat && !(await store.exists(seatsKey))) {
    const seats = {};
    for (let number = 1; number <= seat; number++) seats[number] = "";
    await store.hset(seatsKey, seats);
    await store.expire(seatsKey, RETENTION);
  }

  if (auth.client === "teacher") {
    const userId = identity.sub;
    const teachersKey = `lesson_teacher_${lessonId}`;
    await store.hset(teachersKey, { [userId]: socket.id });
    await store.expire(teachersKey, DAY);
    await store.hset(userId, { lesson_id: lessonId });
    await store.expire(userId, RETENTION);
  } else if (identity) {
    const { sub: clientId, role } = identity;
    socket.data.client_id = clientId;
    socket.data.role = role;
    if (await store.hexists(clientId, "sid")) reportReconnect(clientId, lessonId, role);
    await store.hset(clientId, { sid: socket.id, client_id: clientId, role });
    await store.expire(clientId, DAY);
    const studentsKey = `lesson_student_${lessonId}`;
    await store.hset(studentsKey, { [clientId]: socket.id });
    await store.expire(studentsKey, RETENTION);
  }
  return { status: "SUCCESS", data: {} };
}

// Without a token of Mixpanel nothing is sent, in lesson-server as here.
function reportReconnect() {}

// Registers the handlers. rds: lessonExists(id), seatCount(id); store: exists(key), hset(key, fields),
// hexists(key, field), expire(key, seconds). All of these return promises.
export function serveJoins(io, rds, store) {
  io.use((socket, next) => {
    const { client, lesson_id: lessonId } = socket.handshake.auth;
    const known = client === "teacher" || client === "participant";
    next(known && lessonId ? undefined : new Error("the handshake is wrong"));
  });
  io.on("connection", (socket) => {
    socket.on("join_lesson", async (...data) => {
      const answer = data.pop();
      try {
        answer(await joinLesson(socket, rds, store));
      } catch (fault) {
        console.error(fault);
        answer(error("internal error"));
      }
    });
  });
}
