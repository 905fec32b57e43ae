"""The conditions of a run: its date, the machine, the versions, and the CPU use of other processes."""

import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from contestants import BUN, BUN_COMMAND, NODE

PACKAGES = ("tornado", "python-socketio", "python-engineio", "uvicorn", "uvloop", "redis", "hiredis", "aiopg")
NPM_PACKAGES = {"socket.io": NODE, "pg": NODE, "redis": NODE, "@socket.io/bun-engine": BUN}


def about(stores: Mapping[str, str]) -> dict[str, Any]:
    """Return the date, the machine, and the versions."""
    model = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "revision": _output("git", "describe", "--always", "--dirty"),
        "cpu": model[1] if model else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(int(memory[1]) / 1e6) if memory else None,
        "kernel": platform.release(),
        "versions": {
            "Python": platform.python_version(),
            **dict(stores),
            **{name: _version(name) for name in PACKAGES},
            "Node": _output("node", "--version").removeprefix("v"),
            "Bun": _output(str(BUN_COMMAND), "--version"),
            **{f"{name} (npm)": _npm_version(peer / "node_modules" / name) for name, peer in NPM_PACKAGES.items()},
        },
    }


class Others:
    """The CPU use of processes that are not ours during the run; it is noise in the figures."""

    def __init__(self) -> None:
        self._start = self._now()

    def percent(self) -> float:
        """Return their percentage of the machine's CPU so far; our children count as others until they are reaped."""
        busy, total, ours = (now - start for now, start in zip(self._now(), self._start, strict=True))
        return max(0.0, 100 * (busy - ours) / total)

    @staticmethod
    def _now() -> tuple[float, float, float]:
        ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        idle = ticks[3] + ticks[4]
        second = os.sysconf("SC_CLK_TCK")
        ours = sum(os.times()[:4])
        return (sum(ticks) - idle) / second, sum(ticks) / second, ours


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _npm_version(package: Path) -> str:
    try:
        described = (package / "package.json").read_text("utf-8")
    except FileNotFoundError:
        return "none"
    found = re.search(r'"version": "([^"]+)"', described)
    return found[1] if found else "?"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except FileNotFoundError:
        return "none"
