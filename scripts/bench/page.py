"""Writes docs/benchmarks.md and its plots from the results of one run."""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from contestants import OURS
from load_generator import BACKLOG
from workloads import WARM_SHARE, WARM_WINDOW

Results = dict[str, Any]
# The figures of each round, by contestant.
Rounds = Mapping[str, Sequence[dict[str, float]]]

TIMES = "\N{MULTIPLICATION SIGN}"
COLORS = ("#1f6feb", "#d29922", "#a371f7", "#3fb950", "#f778ba", "#8b949e")
STEPS = (("connect_us", "connect"), ("join_us", "join"), ("end_us", "end"))


class Row(NamedTuple):
    """A row of a table: the figure's name in the results, its title, its decimals, and whether it is compared."""

    figure: str
    title: str
    digits: int = 0
    compared: bool = True


PERCENTILES = (
    Row("ack_p50_ms", "ack p50, ms", 1),
    Row("ack_p95_ms", "ack p95, ms", 1),
    Row("ack_p99_ms", "ack p99, ms", 1),
)
ARRIVAL = Row("arrival_p95_ms", "socket opened to ack, p95, ms", 1)
ACKS = (*PERCENTILES, Row("failed_percent", "joins that failed, %", 1, compared=False))

TABLES: dict[str, tuple[str, str, tuple[Row, ...]]] = {
    "class_start": (
        "Class start",
        "{clients} clients in lessons of 30, a teacher and 29 participants each, connect at once in an order of chance;"
        " each joins as soon as it is connected; when all have joined, all leave at once.",
        (
            Row("join_us", "CPU µs: connection + join"),
            Row("end_us", "CPU µs: end"),
            Row("life_us", "**CPU µs: connection + join + end**"),
            Row("joins_per_s", "connections + joins a second"),
            ARRIVAL,
            *ACKS,
        ),
    ),
    "phases": (
        "Phases",
        "The same {clients} clients in three steps: all connect; when the server has come to rest all join at once;"
        " then all leave. What is left of the cost when nothing else is under way.",
        (
            Row("connect_us", "CPU µs: connection"),
            Row("join_us", "CPU µs: join alone"),
            Row("end_us", "CPU µs: end"),
            Row("joins_per_s", "joins a second"),
            *ACKS,
        ),
    ),
    "storm": (
        "Reconnect storm",
        "{clients} clients that have joined vanish at once, and at once connect and join again.",
        (
            Row("return_us", "CPU µs: end + connection + join"),
            Row("seconds", "seconds until all are back", 2),
            ARRIVAL,
            *ACKS,
        ),
    ),
}

STEADY = """\
## Steady

Clients come at a fixed rate, the same for all, for {seconds:g} seconds; each joins, stays for a second, leaves. A
server can't keep up with a rate if, as the last client comes, more wait for their acknowledgement than come in
{backlog:g} s. A higher rate is then not tried in that round. The figures are of the rounds in which it kept up.
"""
STEADY_ROWS = (Row("life_us", "CPU µs: connection + join + end"), ARRIVAL, *ACKS)
TOO_FAST = "can't keep up"

HOLD_FIGURES = {
    "life_us": "CPU µs: connection + join + end",
    "connect_us": "CPU µs: connection",
    "join_us": "CPU µs: join alone",
    "end_us": "CPU µs: end",
}

WORKERS = """\
## Workers

The class start again, to `lesson-server run --workers N`: N processes that share a port. CPU is that of all of them,
and of their parent. On a machine of two cores, two workers with a core each would leave none to the load generator: so
here server, load generator and stores share all {cores} cores, with 1 worker as with 2, and the columns can be compared
with each other, but not with the tables above, whose servers have a core of their own.
"""
BUSIEST = Row("busiest_percent", "connections that the busiest worker holds when all have joined, %", 1, compared=False)
WORKERS_ROWS = (
    Row("life_us", "CPU µs: connection + join + end"),
    Row("joins_per_s", "connections + joins a second"),
    *ACKS,
    BUSIEST,
    Row("least_busy_percent", "connections that the least busy worker holds then, %", 1, compared=False),
)

COUNTS = (
    ("queries_join", "RDS queries per join"),
    ("redis_reads_join", "Redis round trips per join"),
    ("redis_commands_join", "Redis commands per join, those within scripts too"),
    ("redis_reads_end", "Redis round trips per end"),
)

INTRODUCTION = """\
# Benchmarks

lesson-server beside four other ways to write the same join. Made by `make bench` from one run; the figures of every
round are in [{json}]({json}). What is compared:

* **lesson-server**, as `lesson-server run` starts it: one process, its defaults.
* **plain, Tornado**: the two diagrams written down as one handler on python-socketio, Tornado, aiopg and redis-py, an
  `await` for each arrow ([plain.py](../scripts/bench/peers/plain.py)); asyncio's own event loop.
* **plain, uvicorn**: the same handler on ASGI: uvicorn with uvloop and httptools.
* **Node socket.io**: the same diagrams ([join.mjs](../scripts/bench/peers/join.mjs)) on socket.io, pg and redis
  ([server.js](../scripts/bench/peers/node/server.js)); access tokens are verified by Node's own crypto.
* **Bun socket.io**: the same file on Bun: socket.io with its engine for Bun, and Bun's own clients of PostgreSQL and
  Redis ([server.js](../scripts/bench/peers/bun/server.js)).

All have the same PostgreSQL and Valkey, by unix sockets, and leave the same keys. The peers do the diagrams and no
more. lesson-server does what else its contract asks for: it gives back its presence in Redis when a connection ends
(the peers leave it to expire: compare *end*), bounds what clients may send, keeps metrics, survives a store that
fails. The comparison is to that extent unfair to lesson-server, and nothing is taken off for it.
"""

AHEAD = """\
## Who is ahead

For each figure who has the best, and what {ours} has in comparison; where {ours} is ahead, who comes next.
"""
MORE_IS_BETTER = {"joins_per_s"}

OUTLOOK = """\
## What the next factor would need

Bun compiles socket.io's own engine to machine code while it runs, and handles sockets in native code. lesson-server
is interpreted, and no part of it is a third of what is left. By a sampling profile of class starts: 24 % websockets
(picows, and its system calls to send and close), 13 % the event loop (uvloop, and its system calls to wait and read),
11 % round trips to Redis, 9 % the check of tokens (PyJWT), 7 % the charts (transitions), 7 % python-socketio, 7 % the
sockets of Engine.IO, 6 % connections and the gateway, 4 % each for presence, metrics and RDS, 3 % accepting.

These were tried beyond what is in use, and did not help: the transport of aiofastnet in place of uvloop's (no
difference; all tests pass); a transport that keeps its socket, because uvloop makes a new object each of the eight
times that picows asks for the socket (9 µs, for fifteen lines); the prepared keys of PyJWT (nothing: it prepares the
keys again). These are left to try:

* one write in place of two for the answer to a handshake and the first packet: about 5 µs, and lines of protocol code;
* fewer timers: a connection, its join and its end set five, at 4 µs each;
* more cores, by `--workers`: a process has one, and the rest of a join is spread over many small parts.
"""

METHOD = """\
## How it is measured

* **In turn.** In each of {rounds} rounds every server is started anew, in the order of the tables, warmed up, and goes
  through the workloads. A figure is the median of the rounds, and in brackets the least and the most. *hold* is one
  pass of each server; its figures are medians of {visits} visits.
* **Warm-up**, by one rule for all: class starts that do not count, until the median cost of the last {warm_window} is
  no longer more than {warm_share} % below that of the {warm_window} before them, {most_warm_ups} at most. It took:
  {warm_ups}.
* **CPU** is what the kernel ran the server's process, in user and in kernel mode (its CPU clock), from the first byte
  of a phase until the server is at rest again, divided by the clients. Compilers and garbage collectors in threads of
  their own are in it; the stores are not.
* **The server has one core**, the load generator another one; the stores run where there is room. The server is one
  process; its threads share the core, too.
* **The load generator** speaks raw Engine.IO frames from an epoll loop: websocket only, no polling, no compression
  (browsers offer it, and python-socketio on Tornado then spends more). At most {window} handshakes are under way at
  once, because a plain Tornado's backlog is 128. It costs {generator} µs for a connection, join and end, in its own
  process; the cheapest server takes {cheapest} µs.
* **RDS queries** are the statements that PostgreSQL logs with `log_statement = all`, in a class start of its own that
  is not timed. **Redis round trips** are Valkey's `total_reads_processed`: what a client writes at once, be it a
  command or a pipeline, is read at once. The clients of Node and of Bun write what many joins ask for in one go, so
  these have less than one.
* **Memory** is `Rss` of `/proc/<pid>/smaps_rollup`, less that of the server before the first client, divided by the
  clients held. It includes what earlier visitors have left in the allocator.
* **hold**: pings to held clients that fall into a visit are taken off at what a ping costs in an idle time.
"""


def summary(results: Results) -> Iterator[str]:
    """Return the most important figures as lines for the terminal."""
    for row in (Row("life_us", "CPU µs: connection + join + end"), Row("ack_p95_ms", "ack p95, ms", 1)):
        yield f"class start, {row.title}"
        for name, title in results["titles"].items():
            rounds = results["contestants"][name]["class_start"]
            yield f"  {title:26}{_spread(rounds, row)}"
    for rate in results["about"]["rates"]:
        yield f"{rate} clients a second, CPU µs; ack p95, ms"
        kept = _kept_up(results, rate)
        for name, title in results["titles"].items():
            cells = [_spread(kept[name], row) for row in (STEADY_ROWS[0], PERCENTILES[1]) if kept[name]]
            yield f"  {title:26}{'; '.join(cells) or TOO_FAST}"
    if results["workers"]["titles"]:
        yield "workers, class start, CPU µs; joins a second; connections of the busiest, %"
    for name, title in results["workers"]["titles"].items():
        rounds = results["workers"]["contestants"][name]["class_start"]
        yield f"  {title:26}{'; '.join(_spread(rounds, row) for row in (*WORKERS_ROWS[:2], BUSIEST))}"
    yield "warm-up, class starts"
    for title, count in _warm_ups(results).items():
        yield f"  {title:26}{count}"


def write(results: Results, output: Path) -> None:
    """Write the results to ``output``, and beside it the page and its plots."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    plots = _plots(results, output.with_suffix(""))
    output.with_suffix(".md").write_text("\n".join(_page(results, output.name, plots)) + "\n", "utf-8")


# The page


def _page(results: Results, json_name: str, plots: Sequence[tuple[Path, str]]) -> Iterator[str]:
    about, contestants = results["about"], results["contestants"]
    yield INTRODUCTION.format(json=json_name)
    for plot, caption in plots:
        yield f"![{caption}]({plot.name})\n"
    for workload, (title, text, rows) in TABLES.items():
        yield f"## {title}\n"
        yield text.format(clients=f"{about['clients']:,}") + "\n"
        yield from _table(results["titles"], _rounds(results, workload), rows)
    yield STEADY.format(seconds=about["seconds"], backlog=BACKLOG)
    yield from _steady(results)
    yield "## Hold\n"
    yield from _hold(results)
    yield from _workers(results)
    yield "## What the stores have to do\n"
    yield f"For a class start of {about['clients']:,} joins in {-(-about['clients'] // 30)} lessons.\n"
    yield from _counts(results)
    yield from _ahead(results)
    yield OUTLOOK
    yield METHOD.format(
        rounds=about["rounds"],
        visits=len(next(iter(contestants.values()))["hold"][0]["visits"]),
        window=about["window"],
        warm_window=WARM_WINDOW,
        warm_share=f"{WARM_SHARE * 100:g}",
        most_warm_ups=about["warm_ups"],
        warm_ups="; ".join(f"{title}: {count}" for title, count in _warm_ups(results).items()),
        generator=f"{_lowest(results, 'generator_us')} to {_highest(results, 'generator_us')}",
        cheapest=_lowest(results, "life_us"),
    )
    yield from _about(about)


def _table(
    titles: Mapping[str, str],
    rounds: Rounds,
    rows: Sequence[Row],
    first: tuple[str, ...] | None = None,
    base: str = OURS,
) -> Iterator[str]:
    """Return a table: the header, the cells of ``first``, and the rows of figures, compared to ``base``."""
    yield "| | " + " | ".join(titles.values()) + " |"
    yield "|---" + "|---:" * len(titles) + "|"
    if first is not None:
        yield "| " + " | ".join(first) + " |"
    for row in rows:
        cells = []
        for name in titles:
            cell = _cell(rounds[name], row)
            if name != base and row.compared and rounds[name] and rounds.get(base):
                ratio = _median(rounds[name], row.figure) / _median(rounds[base], row.figure)
                cell += f" **{ratio:.2f}{TIMES}**"
            cells.append(cell)
        yield f"| {row.title} | " + " | ".join(cells) + " |"
    yield ""
    if base in titles:
        yield f"**{TIMES}**: how many times {titles[base]}'s figure.\n"


def _steady(results: Results) -> Iterator[str]:
    titles = results["titles"]
    for rate in results["about"]["rates"]:
        kept = _kept_up(results, rate)
        of = results["about"]["rounds"]
        yield f"### {rate} clients a second\n"
        first = ("rounds in which it kept up", *(f"{len(kept[name])} of {of}" for name in titles))
        yield from _table(titles, kept, STEADY_ROWS, first)


def _ahead(results: Results) -> Iterator[str]:
    titles = results["titles"]
    if OURS not in titles or len(titles) == 1:
        return
    yield AHEAD.format(ours=titles[OURS])
    yield f"| | ahead | {titles[OURS]}, or the next |"
    yield "|---|---|---|"
    for what, rounds, row in _compared(results):
        medians = {name: _median(of, row.figure) for name, of in rounds.items() if of}
        if OURS not in medians or len(medians) == 1:
            continue
        first, second, *_ = sorted(medians, key=lambda name: medians[name], reverse=row.figure in MORE_IS_BETTER)
        other = second if first == OURS else OURS
        cells = [f"{titles[name]}: {medians[name]:,.{row.digits}f}" for name in (first, other)]
        times = f"**{medians[other] / medians[first]:.2f}{TIMES}**"
        yield f"| {what}: {row.title.strip('*')} | {cells[0]} | {cells[1]} {times} |"
    yield ""


def _compared(results: Results) -> Iterator[tuple[str, Rounds, Row]]:
    """Return all figures in which the contestants are compared."""
    for workload, (title, _, rows) in TABLES.items():
        for row in rows:
            if row.compared:
                yield title.lower(), _rounds(results, workload), row
    for rate in results["about"]["rates"]:
        for row in STEADY_ROWS:
            if row.compared:
                yield f"{rate} a second", _kept_up(results, rate), row


def _workers(results: Results) -> Iterator[str]:
    workers = results["workers"]
    if workers["titles"]:  # otherwise lesson-server is not a contestant
        yield WORKERS.format(cores=results["about"]["cores"])
        base = next(iter(workers["titles"]))
        yield from _table(workers["titles"], _rounds(workers, "class_start"), WORKERS_ROWS, base=base)


def _rounds(results: Results, workload: str) -> Rounds:
    return {name: results["contestants"][name][workload] for name in results["titles"]}


def _kept_up(results: Results, rate: int) -> Rounds:
    """Return the rounds in which a server kept up with a rate."""
    steady = {name: results["contestants"][name]["steady"][str(rate)] for name in results["titles"]}
    return {name: [figures for figures in rounds if figures["kept_up"]] for name, rounds in steady.items()}


def _warm_ups(results: Results) -> dict[str, str]:
    """Return the number of warm-ups, by title."""
    counts = {
        title: [len(costs) for costs in part["contestants"][name]["warm_ups"]]
        for part in (results, results["workers"])
        for name, title in part["titles"].items()
    }
    return {title: _range(min(of), max(of)) for title, of in counts.items()}


def _hold(results: Results) -> Iterator[str]:
    titles, contestants = results["titles"], results["contestants"]
    levels = [level["held"] for level in next(iter(contestants.values()))["hold"]]
    visitors = results["about"]["visitors"]
    yield (
        f"Clients join and stay; beside them, {visitors} others connect, join and leave."
        " The tables have the server's CPU for one of these, and the memory.\n"
    )
    if levels[-1] % 1_000:
        yield f"The limit of open files of this machine lets a process hold {levels[-1]:,} connections, no more.\n"
    header = " | ".join(f"{level:,} held" for level in levels)
    for figure, title in HOLD_FIGURES.items():
        yield f"| {title} | {header} | last to first |"
        yield "|---" + "|---:" * (len(levels) + 1) + "|"
        for name, who in titles.items():
            visits = [level["visits"] for level in contestants[name]["hold"]]
            cells = " | ".join(_spread(of, Row(figure, title)) for of in visits)
            growth = _median(visits[-1], figure) / _median(visits[0], figure)
            yield f"| {who} | {cells} | {growth:.2f}{TIMES} |"
        yield ""
    for name, who in titles.items():
        if failed := contestants[name]["hold"][-1]["failed"]:
            yield f"Of the joins of those that {who} should hold, {failed:,} failed.\n"
    yield f"| Memory, kB for each held connection | {header} |"
    yield "|---" + "|---:" * len(levels) + "|"
    for name, who in titles.items():
        yield f"| {who} | " + " | ".join(f"{at['rss_kb_per_held']:.1f}" for at in contestants[name]["hold"]) + " |"
    yield ""


def _counts(results: Results) -> Iterator[str]:
    titles = results["titles"]
    yield "| | " + " | ".join(titles.values()) + " |"
    yield "|---" + "|---:" * len(titles) + "|"
    counts = {name: results["contestants"][name]["counts"] for name in titles}
    yield "| RDS queries in all | " + " | ".join(f"{counts[name]['queries_join']:,}" for name in titles) + " |"
    for figure, title in COUNTS:
        yield f"| {title} | " + " | ".join(f"{counts[n][figure] / counts[n]['joins']:.2f}" for n in titles) + " |"
    yield ""


def _about(about: dict[str, Any]) -> Iterator[str]:
    yield "## This run\n"
    yield f"* {about['date']}, revision {about['revision']}"
    yield f"* {about['cpu']}, {about['cores']} cores, {about['memory_gb']} GB, Linux {about['kernel']}"
    yield f"* other processes used {about['others_percent']:.0f} % of its CPU meanwhile: that is in the spread"
    yield "* " + ", ".join(f"{name} {version}" for name, version in about["versions"].items())


def _median(rounds: Sequence[dict[str, float]], figure: str) -> float:
    return statistics.median(measured[figure] for measured in rounds)


def _spread(rounds: Sequence[dict[str, float]], row: Row) -> str:
    values = [measured[row.figure] for measured in rounds]
    middle, least, most = (
        f"{value:,.{row.digits}f}" for value in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} ({_range(least, most)})" if least != most else middle


def _cell(rounds: Sequence[dict[str, float]], row: Row) -> str:
    return _spread(rounds, row) if rounds else TOO_FAST


def _range(least: object, most: object) -> str:
    return f"{least}–{most}" if least != most else str(least)  # noqa: RUF001 (a range)


def _medians(results: Results, figure: str) -> list[float]:
    return [_median(of["class_start"], figure) for of in results["contestants"].values()]


def _lowest(results: Results, figure: str) -> str:
    return f"{min(_medians(results, figure)):.0f}"


def _highest(results: Results, figure: str) -> str:
    return f"{max(_medians(results, figure)):.0f}"


# The plots


def _plots(results: Results, stem: Path) -> list[tuple[Path, str]]:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update(
        {
            "figure.dpi": 130,
            "font.size": 9,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
        }
    )
    drawn = []
    for name, draw, caption in (
        ("cpu", _draw_cpu, "CPU for a connection, join and end in a class start"),
        ("held", _draw_held, "CPU against the number of held connections"),
        ("ack", _draw_acks, "latency of the acknowledgement"),
    ):
        path = stem.with_name(f"{stem.name}-{name}.png")
        figure = draw(results)
        figure.savefig(path)
        drawn.append((path, caption))
    return drawn


def _figure(columns: int, height: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _draw_cpu(results: Results) -> Any:
    figure, (axes,) = _figure(1, 2.8)
    titles = list(results["titles"].values())
    rounds = [results["contestants"][name]["class_start"] for name in results["titles"]]
    joins, ends, lives = ([_median(of, key) for of in rounds] for key in ("join_us", "end_us", "life_us"))
    axes.barh(titles, joins, color=COLORS[0], label="connection + join", height=0.6)
    axes.barh(titles, ends, left=joins, color=COLORS[1], label="end", height=0.6)
    spread = [
        [life - min(m["life_us"] for m in of) for life, of in zip(lives, rounds, strict=True)],
        [max(m["life_us"] for m in of) - life for life, of in zip(lives, rounds, strict=True)],
    ]
    axes.errorbar(lives, titles, xerr=spread, fmt="none", ecolor="#333", capsize=3, linewidth=1)
    for title, total, of in zip(titles, lives, rounds, strict=True):
        axes.annotate(
            f"{total:,.0f} µs",
            (max(total, max(m["life_us"] for m in of)), title),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
        )
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("server CPU for one client of a class start, µs (bars: least and most of the rounds)")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def _draw_held(results: Results) -> Any:
    figure, all_axes = _figure(len(STEPS), 3.2)
    for axes, (key, step) in zip(all_axes, STEPS, strict=True):
        for color, (name, title) in zip(COLORS, results["titles"].items(), strict=False):
            hold = results["contestants"][name]["hold"]
            held = [level["held"] for level in hold]
            axes.plot(held, [_median(level["visits"], key) for level in hold], "o-", color=color, label=title, ms=4)
        axes.set_xscale("log")
        axes.set_xticks(held, [f"{level / 1000:g}k" if level >= 1000 else str(level) for level in held])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_title(step)
        axes.set_xlabel("connections held")
    all_axes[0].set_ylabel("server CPU for one client, µs")
    _legend(figure, all_axes[0])
    return figure


def _draw_acks(results: Results) -> Any:
    rates = results["about"]["rates"]
    panels = [
        ("class start", _rounds(results, "class_start")),
        *((f"{rate} a second", _kept_up(results, rate)) for rate in rates),
        ("storm", _rounds(results, "storm")),
    ]
    figure, all_axes = _figure(len(panels), 3.2)
    titles = results["titles"]
    width = 0.8 / len(titles)
    for axes, (panel, rounds) in zip(all_axes, panels, strict=True):
        for number, (color, (name, who)) in enumerate(zip(COLORS, titles.items(), strict=False)):
            places = [place + number * width for place in range(len(PERCENTILES))]
            if rounds[name]:
                heights = [_median(rounds[name], row.figure) for row in PERCENTILES]
                axes.bar(places, heights, width, color=color, label=who)
            else:
                where = (places[0], 0.02)
                axes.annotate(
                    TOO_FAST, where, xycoords=axes.get_xaxis_transform(), rotation=90, ha="center", size=7, color=color
                )
        middle = 0.4 - width / 2
        axes.set_xticks([place + middle for place in range(len(PERCENTILES))], ["p50", "p95", "p99"])
        axes.set_title(panel)
        axes.grid(visible=False, axis="x")
    all_axes[0].set_ylabel("join_lesson to acknowledgement, ms")
    _legend(figure, all_axes[0])
    return figure


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
