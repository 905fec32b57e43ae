"""The outcomes and latencies of simulated clients: as JSON, as a table, and as a plot."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich.table import Table

SUCCESS = "SUCCESS"  # the outcome of a client whose join, and seat, succeeded; any other outcome is a failure

PERCENTILES = (50, 95, 99)


class Reported(Protocol):
    """What a report needs of a client: its outcome and its latencies; None for a step that it did not complete."""

    @property
    def outcome(self) -> str: ...

    @property
    def connect_ms(self) -> float | None: ...

    @property
    def join_ms(self) -> float | None: ...

    @property
    def seat_ms(self) -> float | None: ...


def percentile(values: Iterable[float], percent: int) -> float:
    """Return the nearest-rank percentile, which is one of the values; there must be at least one value."""
    ordered = sorted(values)
    return ordered[math.ceil(len(ordered) * percent / 100) - 1]


@dataclass(frozen=True)
class Report:
    """The outcomes and latencies of the clients, as JSON, a table and a plot."""

    clients: Sequence[Reported]

    @property
    def failed(self) -> int:
        return sum(client.outcome != SUCCESS for client in self.clients)

    @property
    def outcomes(self) -> Counter[str]:
        return Counter(client.outcome for client in self.clients)

    @property
    def connect_ms(self) -> list[float]:
        """The latency of each connection that was established."""
        return [client.connect_ms for client in self.clients if client.connect_ms is not None]

    def join_ms(self, outcome: str = SUCCESS) -> list[float]:
        """Return the latency of each join that ended with ``outcome``."""
        return [c.join_ms for c in self.clients if c.join_ms is not None and c.outcome == outcome]

    def seat_ms(self, outcome: str = SUCCESS) -> list[float]:
        """Return the latency of each ``take_seat`` that ended with ``outcome``."""
        return [c.seat_ms for c in self.clients if c.seat_ms is not None and c.outcome == outcome]

    def as_json(self) -> str:
        """Return the report as one JSON object; the percentiles of joins and seats are of successful clients only."""
        return json.dumps(
            {
                "clients": len(self.clients),
                "failed": self.failed,
                "outcomes": dict(self.outcomes.most_common()),
                "connect_ms": _percentiles(self.connect_ms),
                "join_ms": _percentiles(self.join_ms()),
                "seat_ms": _percentiles(self.seat_ms()),
            },
            ensure_ascii=False,
        )

    def as_table(self) -> Table:
        """Return the outcomes, the most frequent first, each with its percentiles: joins, and below them seats."""
        latencies = {"join": self.join_ms}
        if any(client.seat_ms is not None for client in self.clients):
            latencies["seat"] = self.seat_ms
        table = Table("outcome")
        for heading in ("clients", *("\n".join(f"{step} p{percent}" for step in latencies) for percent in PERCENTILES)):
            table.add_column(heading, justify="right", no_wrap=True)
        for outcome, count in self.outcomes.most_common():
            steps = [_percentiles(of(outcome)).values() for of in latencies.values()]
            table.add_row(
                outcome,
                str(count),
                *("\n".join(map(_milliseconds, values)) for values in zip(*steps, strict=True)),
                style="green" if outcome == SUCCESS else "red",
            )
        return table

    def plot(self, file: Path, title: str) -> None:
        """Plot the cumulative distributions of the latencies."""
        from matplotlib.figure import Figure  # imported here: it takes half a second, and only a plot needs it

        figure = Figure(figsize=(9, 5), layout="constrained")
        axes = figure.add_subplot()
        curves = {"connect": self.connect_ms, "join": self.join_ms(), "seat": self.seat_ms()}
        for color, (name, latencies) in zip(("tab:blue", "tab:orange", "tab:green"), curves.items(), strict=True):
            if not latencies:
                continue
            marks = {percent: percentile(latencies, percent) for percent in PERCENTILES}
            label = f"{name} ({len(latencies)}): " + ", ".join(f"p{p} {ms:.1f}" for p, ms in marks.items()) + " ms"
            axes.ecdf(latencies, color=color, linewidth=2, label=label)
            axes.plot(list(marks.values()), [percent / 100 for percent in marks], "o", color=color, markersize=6)
        for percent in PERCENTILES:
            axes.axhline(percent / 100, color="grey", linewidth=0.8, linestyle=":")
            axes.annotate(
                f"p{percent}",
                (1, percent / 100),
                xycoords=("axes fraction", "data"),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color="dimgrey",
            )
        axes.set(title=title, xlabel="milliseconds", ylabel="share of clients", ylim=(0, 1.03))
        axes.set_xlim(left=0)
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
        figure.savefig(file, dpi=150)


def _percentiles(latencies: list[float]) -> dict[str, float | None]:
    return {f"p{p}": round(percentile(latencies, p), 3) if latencies else None for p in PERCENTILES}


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} ms"
