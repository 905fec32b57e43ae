# The image of lesson-server: one process, Python's slim image, no compiler, no pip, no embedded stores.
#
#     docker build --tag lesson-server .
#     docker run --rm --read-only --stop-timeout 30 --publish 127.0.0.1:8080:8080 --env-file secrets.env lesson-server
#
# docs/operating/containers.md tells how to run it. The tests of this file are in tests/conf/test_image.py.

# Every dependency has a wheel for this Python on x86-64 and ARM64. Another base needs python3 (3.11 or newer, with venv)
# and glibc 2.28 or newer: docker build --build-arg BASE=...
ARG BASE=docker.io/library/python:3.13-slim-trixie


# The venv. Both stages need the same base, because a venv links to the Python that made it.

# hadolint ignore=DL3006
FROM ${BASE} AS build
WORKDIR /src
# pip is needed here only, so it has a venv of its own.
RUN python3 -m venv /pip && python3 -m venv --without-pip /opt/lesson-server
COPY setup.py pyproject.toml README.md LICENSE ./
# lesson_server/schema.sql is a link to it.
COPY conf/schema.sql conf/
COPY statecharts statecharts/
COPY lesson_server lesson_server/
# Such as [otel], for traces.
ARG EXTRAS=
# Wheels only: the stage has no compiler.
RUN --mount=type=cache,target=/root/.cache/pip \
    /pip/bin/pip wheel --no-deps --wheel-dir /wheels . && \
    /pip/bin/pip --python /opt/lesson-server/bin/python3 install --only-binary :all: "$(echo /wheels/*.whl)${EXTRAS}"


# hadolint ignore=DL3006
FROM ${BASE}
LABEL org.opencontainers.image.title="lesson-server" \
      org.opencontainers.image.description="A Socket.IO server that teachers and participants join lessons on" \
      org.opencontainers.image.licenses="MIT"
# A fixed number, so that Kubernetes can see that it is not root. libpq wants the user to have a name.
RUN groupadd --gid 10001 lesson-server && \
    useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin lesson-server
COPY --from=build /opt/lesson-server /opt/lesson-server
COPY conf/production.toml /etc/lesson-server/
# The file is for a server behind an nginx on the same machine. Here nginx is in another container.
ENV PATH=/opt/lesson-server/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    LESSON_SERVER_HOST=0.0.0.0
USER 10001:10001
WORKDIR /
EXPOSE 8080
# The process writes no files, so that the root file system can be read-only. With LESSON_SERVER_WORKERS above 1 it needs a
# tmpfs at /tmp, for the metrics that the workers share.

# Without the modules that urllib imports, and past any proxy that the environment names.
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 CMD ["python3", "-ISc", "import http.client, os; c = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('LESSON_SERVER_PORT', '8080')), timeout=2); c.request('GET', '/healthz'); raise SystemExit(c.getresponse().status != 200)"]
# The exec form, so that the server is process 1 and gets SIGTERM: it drains for server.drain seconds and exits with 0.
STOPSIGNAL SIGTERM
ENTRYPOINT ["lesson-server"]
CMD ["run", "--config", "/etc/lesson-server/production.toml"]
