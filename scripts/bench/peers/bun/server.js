// The join on Bun: ../join.mjs with socket.io's engine for Bun, and Bun's own clients of PostgreSQL and Redis.
// From the environment: PGHOST PGPORT PGUSER PGDATABASE BENCH_REDIS_SOCKET BENCH_KEY BENCH_PORT.

import { Server as Engine } from "@socket.io/bun-engine";
import { RedisClient, SQL } from "bun";
import { Server } from "socket.io";
import { serveJoins } from "../join.mjs";

const { BENCH_PORT, BENCH_REDIS_SOCKET, PGDATABASE, PGHOST, PGPORT, PGUSER } = process.env;

// All is said here, because Bun would prefer a DATABASE_URL of the environment to the variables PG….
const sql = new SQL({
  adapter: "postgres",
  path: `${PGHOST}/.s.PGSQL.${PGPORT}`,
  username: PGUSER,
  database: PGDATABASE,
  max: 10,
});
const rds = {
  async lessonExists(id) {
    return (await sql`SELECT 1 FROM lessons WHERE id = ${id}`).length > 0;
  },
  async seatCount(id) {
    return (await sql`SELECT seat_count FROM lessons WHERE id = ${id}`)[0].seat_count;
  },
};

// It has the methods that the join wants, and pipelines commands by itself.
const store = new RedisClient(`redis+unix://${BENCH_REDIS_SOCKET}`);
await store.connect();

const io = new Server();
const engine = new Engine({ path: "/socket.io/" });
io.bind(engine);
serveJoins(io, rds, store);
Bun.serve({ hostname: "127.0.0.1", port: Number(BENCH_PORT), ...engine.handler() });
console.log("listening");
