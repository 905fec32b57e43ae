"""The page of sizing: its arithmetic, its table, and the measurement of what it calculates with."""

import json
import os
import re
import secrets
import shutil
import subprocess

import pytest
import sizing
import sizing_figures
from cluster import ROOT
from contestants import CONTESTANTS, OURS, running
from load_generator import Load
from measuring import Stores
from processes import unmeasured

PAGE = ROOT / "docs/sizing.md"
# Figures from which the results can be told without a calculator.
SIMPLE = {
    "arrivals": {
        "100": {
            "server_us": 2000,
            "redis_us": 200,
            "rds_us": 100,
            "rds_queries": 1,
            "redis_bytes_in": 9,
            "redis_bytes_out": 1,
        },
        "300": {
            "server_us": 1000,
            "redis_us": 100,
            "rds_us": 50,
            "rds_queries": 0.5,
            "redis_bytes_in": 9,
            "redis_bytes_out": 1,
        },
    },
    "held": {
        "server_us": 10,
        "redis_us": 1,
        "redis_bytes_in": 0.5,
        "redis_bytes_out": 0.5,
        "redis_memory": 2000,
        "arrival_bytes_sent": 434,
        "arrival_segments_sent": 1,
        "arrival_bytes_received": 334,
        "arrival_segments_received": 1,
        "bytes_sent": 0.34,
        "segments_sent": 0.01,
        "bytes_received": 0.34,
        "segments_received": 0.01,
    },
    "memory": {"process_kb": 100_000, "connection_kb": 10},
}
PLAIN = {"minutes": 5, "peakFactor": 3, "share": 0.6, "connections": 20_000, "poolSize": 4}


def evaluate(figures, *expressions):
    """What the functions of docs/javascripts/sizing.js return."""
    command = ("node", ROOT / "tests/js/sizing.mjs", json.dumps(figures), *expressions)
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def size(participants):
    return f"size({json.dumps({'participants': participants, **PLAIN})}, measured)"


needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")


@needs_node
def test_between_two_measured_rates_a_figure_is_on_the_line_and_outside_it_is_the_nearest():
    at = "[50, 100, 150, 300, 900].map((rate) => at(rate, measured.arrivals, 'server_us'))"
    assert evaluate(SIMPLE, at) == [[2000, 2000, 1750, 1000, 1000]]


@needs_node
def test_the_needs_of_a_set_up():
    (needs,) = evaluate(SIMPLE, size(100_000))
    # 1,000 a second at the peak. Two processes of 500: 0.5 s of CPU for arrivals, 0.5 s for 50,000 who stay. Three of
    # 333: 0.33 and 0.33. Four of 250: 0.25 times 1,250 µs, and 0.25.
    assert needs.pop("oneProcess") == pytest.approx(1 + 1)
    assert needs == pytest.approx(
        {
            "peak": 1000,
            "forCpu": 4,
            "forConnections": 5,
            "processes": 6,
            "memory": 6 * 100e6 + 100_000 * 10e3,
            "redisCores": 1000 * 150e-6 + 0.1,  # five processes of 200 a second
            "redisMasters": 1,
            "redisMemory": 200e6,
            "redisBandwidth": 10_000 + 100_000,
            "rdsQueries": 750,
            "rdsCores": 1000 * 75e-6,
            "rdsConnections": 30,
            "fromClients": 1000 * 500 + 100_000,
            "toClients": 1000 * 400 + 100_000,
        }
    )


@needs_node
def test_what_gives_way_first_comes_first():
    (limits,) = evaluate(SIMPLE, f"limits({json.dumps({'participants': 100_000, **PLAIN})}, measured)")
    assert [what for what, _ in limits] == [
        "connections of one process",
        "CPU of one process",
        "100 connections to RDS",
        "CPU of one Redis",
        "CPU of one core of RDS",
    ]
    assert [share for _, share in limits] == pytest.approx([4, 2, 0.3, 0.25, 0.075])


@needs_node
def test_the_table_of_the_page_is_what_the_calculator_says():
    """After a new measurement this shows the new rows; what the page says of them has to be true still."""
    participants = [1_000, 100_000, 1_000_000]
    cells = ", ".join(f"text({size(number)})" for number in participants)
    rows, *limits = evaluate(
        sizing_figures.measured(),
        f"ROWS.map(([what, text]) => ['', what, {cells}, ''].join(' | ').trim())",
        *(f"limits({json.dumps({'participants': number, **PLAIN})}, measured)" for number in participants),
    )
    assert "\n".join(rows) in PAGE.read_text("utf-8"), "\n".join(rows)
    above = [[what for what, share in shares if share > 1] for shares in limits]
    assert above[0] == []
    assert above[1] == ["connections of one process", "CPU of one process"]
    assert above[2][:4] == [*above[1], "CPU of one Redis", "100 connections to RDS"]


def test_the_form_begins_with_the_values_of_the_table():
    values = dict(re.findall(r'name="(\w+)".*? value="([\d.]+)"', PAGE.read_text("utf-8")))
    assert values == {"participants": "100000", **{name: f"{value:g}" for name, value in PLAIN.items()}, "share": "60"}


def test_the_measurement_has_a_figure_for_everything(stores, tmp_path, monkeypatch):
    for name in os.environ.keys() - unmeasured().keys():
        monkeypatch.delenv(name)  # the server is killed at the end
    monkeypatch.setattr(sizing, "SECONDS", 0.2)
    monkeypatch.setattr(sizing, "STAY", 0.1)
    bench_stores = Stores(stores.dsn, stores.redis_url, stores.data_dir / "postgresql.log")
    bench_stores.add_lessons(2, 30)
    key = secrets.token_urlsafe(32)
    with running(CONTESTANTS[OURS], bench_stores, key, None, tmp_path / "log") as server:
        bench = sizing.Bench(bench_stores, server, Load("127.0.0.1", server.port, key))
        arrivals = {**bench.arrivals(50), "rds_queries": bench.queries(50)}
        held = bench.held(30, 0.2)
    calculated_with = sizing_figures.measured()
    assert arrivals.keys() == calculated_with["arrivals"]["50"].keys()
    assert held.keys() == calculated_with["held"].keys()
    assert min(arrivals[name] for name in ("server_us", "redis_us", "rds_us", "redis_bytes_in", "rds_queries")) > 0
    # The upgrade, the handshake with its token, and the join; the answers to these.
    assert 350 < held["arrival_bytes_sent"] < 600
    assert 200 < held["arrival_bytes_received"] < 450
    assert held["arrival_segments_sent"] >= 3
