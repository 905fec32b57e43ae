"""``lesson-server`` with times of a test's:
``python tests/support/node.py '{"stores.redis.nodes.CHECK_PERIOD": 1.0}' run``.

They are constants and no settings: an operator who changed one on some nodes only would have them sweep the others.
"""

import importlib
import json
import sys

from lesson_server.cli.commands import main

if __name__ == "__main__":
    for name, seconds in json.loads(sys.argv[1]).items():
        module_name, _, constant = name.rpartition(".")
        module = importlib.import_module(f"lesson_server.{module_name}")
        getattr(module, constant)  # one that was renamed must not be patched in vain
        setattr(module, constant, seconds)
    sys.exit(main(sys.argv[2:]))
