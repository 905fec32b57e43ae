// The arithmetic of docs/sizing.md: what a number of participants who come within some minutes needs. The page calls it,
// and so does a test. `measured` are the figures of scripts/docs/sizing_figures.py.
//
// Every figure is of the peak: clients don't arrive evenly, so the peak rate is some times the mean.

const MICROSECONDS = 1e6;
const KB = 1e3;
// Ethernet, IPv4 and TCP with timestamps, for each segment.
const SEGMENT_OVERHEAD = 66;

// Returns what is measured at a rate of one process, such as µs for each client. Between two measured rates it lies on
// the line between them; outside of them it is that of the nearest one.
function at(rate, arrivals, name) {
  const points = Object.entries(arrivals).map(([of, figures]) => [Number(of), figures[name]]).sort((a, b) => a[0] - b[0]);
  const above = points.findIndex(([of]) => of >= rate);
  if (above === 0) return points[0][1];
  if (above < 0) return points.at(-1)[1];
  const [[r0, f0], [r1, f1]] = [points[above - 1], points[above]];
  return f0 + ((f1 - f0) * (rate - r0)) / (r1 - r0);
}

// Returns the share of a core that each of some processes uses at the peak.
function shareOfProcess(processes, peak, participants, measured) {
  const rate = peak / processes;
  const arriving = rate * at(rate, measured.arrivals, "server_us");
  const holding = (participants / processes) * measured.held.server_us;
  return (arriving + holding) / MICROSECONDS;
}

// Returns the needs of one set-up: cores, bytes, and rates a second.
//   participants  who come within `minutes`
//   peakFactor    the peak rate of arrivals, as a multiple of the mean
//   share         the share of a core that a process or Redis may use
//   connections   that a process holds at most
//   poolSize      rds.pool_size
function size({ participants, minutes, peakFactor, share, connections, poolSize }, measured) {
  const peak = (participants / (minutes * 60)) * peakFactor;
  const forConnections = Math.ceil(participants / connections);
  let forCpu = 1;
  while (shareOfProcess(forCpu, peak, participants, measured) > share) forCpu++;
  const needed = Math.max(forConnections, forCpu);
  const processes = needed + 1;  // one may fail
  const rate = peak / needed;
  const ofPeak = (name) => peak * at(rate, measured.arrivals, name);
  const wire = (bytes, segments) => bytes + segments * SEGMENT_OVERHEAD;
  const { held } = measured;
  const redisCores = (ofPeak("redis_us") + participants * held.redis_us) / MICROSECONDS;
  return {
    peak,
    forCpu,
    forConnections,
    processes,
    oneProcess: shareOfProcess(1, peak, participants, measured),
    memory: (processes * measured.memory.process_kb + participants * measured.memory.connection_kb) * KB,
    redisCores,
    redisMasters: Math.max(1, Math.ceil(redisCores / share)),
    redisMemory: participants * held.redis_memory,
    redisBandwidth: ofPeak("redis_bytes_in") + ofPeak("redis_bytes_out") + participants * (held.redis_bytes_in + held.redis_bytes_out),
    rdsQueries: ofPeak("rds_queries"),
    rdsCores: ofPeak("rds_us") / MICROSECONDS,
    rdsConnections: processes * (poolSize + 1),
    fromClients: peak * wire(held.arrival_bytes_sent, held.arrival_segments_sent)
      + participants * wire(held.bytes_sent, held.segments_sent),
    toClients: peak * wire(held.arrival_bytes_received, held.arrival_segments_received)
      + participants * wire(held.bytes_received, held.segments_received),
  };
}

// Returns what has to give way first if nothing is done: one process with the defaults, one Redis, and a PostgreSQL that
// takes 100 connections. The largest share of what there is comes first.
function limits(input, measured) {
  const needs = size(input, measured);
  return [
    ["CPU of one process", needs.oneProcess],
    ["connections of one process", input.participants / 25_000],
    ["CPU of one Redis", needs.redisCores],
    ["100 connections to RDS", needs.rdsConnections / 100],
    ["CPU of one core of RDS", needs.rdsCores],
  ].sort((a, b) => b[1] - a[1]);
}

// The rows of the table: what is needed, and its text.
const rounded = (number) => Number(number.toPrecision(2)).toLocaleString("en-US");
const count = (number) => Math.ceil(number).toLocaleString("en-US");
const bits = (bytes) => `${rounded((bytes * 8) / 1e6)} Mbit/s`;
const bytes = (number) => (number < 1e9 ? `${rounded(number / 1e6)} MB` : `${rounded(number / 1e9)} GB`);

const ROWS = [
  ["arrivals a second, at the peak", (needs) => count(needs.peak)],
  ["processes for the CPU", (needs) => count(needs.forCpu)],
  ["processes for the connections", (needs) => count(needs.forConnections)],
  ["processes, with one that may fail", (needs) => count(needs.processes)],
  ["memory of all processes", (needs) => bytes(needs.memory)],
  ["Redis: cores", (needs) => rounded(needs.redisCores)],
  ["Redis: masters", (needs) => count(needs.redisMasters)],
  ["Redis: memory", (needs) => bytes(needs.redisMemory)],
  ["Redis: network, both directions", (needs) => bits(needs.redisBandwidth)],
  ["RDS: queries a second", (needs) => count(needs.rdsQueries)],
  ["RDS: cores", (needs) => rounded(needs.rdsCores)],
  ["RDS: connections", (needs) => count(needs.rdsConnections)],
  ["network from clients", (needs) => bits(needs.fromClients)],
  ["network to clients", (needs) => bits(needs.toClients)],
];
