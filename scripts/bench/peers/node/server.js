// The join on Node: ../join.mjs with socket.io's own engine (on ws), pg and redis.
// From the environment: PGHOST PGPORT PGUSER PGDATABASE BENCH_REDIS_SOCKET BENCH_KEY BENCH_PORT.

import http from "node:http";
import pg from "pg";
import { createClient } from "redis";
import { Server } from "socket.io";
import { serveJoins } from "../join.mjs";

const { BENCH_PORT, BENCH_REDIS_SOCKET } = process.env;

const pool = new pg.Pool({ max: 10 });
const rds = {
  async lessonExists(id) {
    return (await pool.query("SELECT 1 FROM lessons WHERE id = $1", [id])).rowCount > 0;
  },
  async seatCount(id) {
    return (await pool.query("SELECT seat_count FROM lessons WHERE id = $1", [id])).rows[0].seat_count;
  },
};

const client = createClient({ socket: { path: BENCH_REDIS_SOCKET } });
await client.connect();
const store = {
  exists: (key) => client.exists(key),
  hset: (key, fields) => client.hSet(key, fields),
  hexists: (key, field) => client.hExists(key, field),
  expire: (key, seconds) => client.expire(key, seconds),
};

const server = http.createServer();
serveJoins(new Server(server), rds, store);
server.listen(Number(BENCH_PORT), "127.0.0.1", () => console.log("listening"));
