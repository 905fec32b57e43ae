"""``lesson-server`` with times of a test's:
``python tests/support/node.py '{"stores.redis.nodes.CHECK_PERIOD": 1.0}' run``.

They are constants and no settings: an operator who changed one on some nodes only would have them sweep the others.

Each drift between the messages and the AsyncAPI document is a line on stderr. Then the exit status of a server without
workers is not 0.
"""

import importlib
import json
import sys

from lesson_server.cli import run
from lesson_server.cli.commands import main

DRIFT = "drift: "
EXIT_DRIFT = 70


def record(report):
    """Checks every message of the server, and of each worker; what each reports is its own."""
    serve = run._serve_until_signal

    async def serve_recorded(*args):
        from recorder import recorded_servers  # imports the server, as late as `run` does: see _supervise

        with recorded_servers(report):
            await serve(*args)

    run._serve_until_signal = serve_recorded


if __name__ == "__main__":
    for name, seconds in json.loads(sys.argv[1]).items():
        module_name, _, constant = name.rpartition(".")
        module = importlib.import_module(f"lesson_server.{module_name}")
        getattr(module, constant)  # one that was renamed must not be patched in vain
        setattr(module, constant, seconds)
    drifts = []

    def report(drift):
        drifts.append(drift)
        print(f"{DRIFT}{drift}", file=sys.stderr, flush=True)

    record(report)
    status = main(sys.argv[2:])
    sys.exit(status or (EXIT_DRIFT if drifts else 0))
