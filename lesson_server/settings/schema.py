"""Every setting of the server: its meaning, its default, its check (contract, section 8).

A setting is named ``section.key``; ``sources.py`` finds its value. A secret is a :class:`~pydantic.SecretStr`, so that
no repr, log or error shows it.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationInfo, field_validator

from lesson_server.settings.values import (
    HttpUrl,
    KeyPrefix,
    LessonQuery,
    NonEmptyPath,
    NonEmptyText,
    OptionalPath,
    OptionalRedisUrl,
    OptionalSecret,
    OptionalText,
    Origins,
    Seconds,
    WholeSeconds,
    read_key_file,
)


class SettingsError(Exception):
    """A setting is unknown, wrong or missing; the message is one line that names the setting and holds no secret."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # a TOML key or a path may hold a newline


# The sections.


class Section(BaseModel):
    """The base of every section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ServerSettings(Section):
    """Where the server listens, for which origins, and how much load it accepts.

    Attributes:
        host: the address to listen on.
        port: the TCP port; 0 takes any free one.
        workers: processes that share the port.
        drain: seconds over which the connections are closed when the server is told to stop.
        max_connections: connections that one worker holds at most.
        connect_rate: connections a second that one worker accepts; a burst may be twice as many. 0: no limit.
        join_rate: joins a second that one worker accepts; a burst may be twice as many. 0: no limit.
        allowed_origins: the web origins whose pages may connect; none: the server's own only; ``*`` alone: any.
        data_dir: the directory of the embedded stores and their generated key.
        log_format: how the lines of the log are written: ``text`` for people, or ``json``, an object a line.
    """

    host: NonEmptyText = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8080
    workers: Annotated[int, Field(ge=1, le=256)] = 1
    drain: Annotated[float, Field(ge=0, le=600)] = 10.0
    max_connections: Annotated[int, Field(ge=1)] = 25_000
    connect_rate: Annotated[float, Field(ge=0, le=1_000_000)] = 2_500.0
    join_rate: Annotated[float, Field(ge=0, le=1_000_000)] = 2_500.0
    allowed_origins: Origins = ()
    data_dir: NonEmptyPath = Path(".lesson-server")
    log_format: Literal["text", "json"] = "text"


class RdsSettings(Section):
    """The PostgreSQL that has the lessons.

    Attributes:
        dsn: a libpq connection string or URI. None, and ``redis.url`` None: the embedded set-up.
        lesson_query: one statement that returns the seat count of ``%(lesson_id)s``, or no row (contract, section 6).
        timeout: seconds for one query. At most 3, because a join is answered within 5 s whatever fails.
        pool_size: connections of one worker, open from its start; one further connection is for readiness and probes.
    """

    dsn: OptionalSecret = None
    lesson_query: LessonQuery = "SELECT seat_count FROM lessons WHERE id = %(lesson_id)s"
    timeout: Annotated[float, Field(gt=0, le=3)] = 2.0
    pool_size: Annotated[int, Field(ge=1, le=100)] = 4


class RedisSettings(Section):
    """The Redis or Valkey that holds seats and presence.

    Attributes:
        url: a URL; see ``stores/redis/client.py`` for its schemes. None, and ``rds.dsn`` None: the embedded set-up.
        key_prefix: the prefix of every key. It may have braces only as one hash tag: a record and the server's own keys
            for that record must be in one slot of a Redis Cluster.
        timeout: seconds for one command. At most 2, because a join is answered within 5 s whatever fails.
        pool_size: connections of one worker at most.
    """

    url: OptionalRedisUrl = None
    key_prefix: KeyPrefix = ""
    timeout: Annotated[float, Field(gt=0, le=2)] = 2.0
    pool_size: Annotated[int, Field(ge=1)] = 16


class AuthSettings(Section):
    r"""Which access tokens are accepted; ``tokens.py`` checks that the key fits the algorithm.

    Attributes:
        key_file: a file that holds the key; a newline at its end is not part of the key.
        key: the HMAC secret or the PEM that tokens are verified with; read from ``key_file`` if that is set. In
            an environment variable, the newlines of a PEM may be written as ``\n``.
        algorithm: the only ``alg`` that a token may have.
        audience: the ``aud`` that a token must have; None: any or none.
        issuer: the ``iss`` that a token must have; None: any or none.
        trust_teacher_user_id: whether a teacher may send a ``user_id`` in place of a token (contract, section 2).
    """

    key_file: OptionalPath = None
    # Declared after key_file, because its validator sees only the fields declared before it.
    key: Annotated[OptionalSecret, Field(validate_default=True)] = None
    algorithm: Literal[
        "HS256", "HS384", "HS512",
        "RS256", "RS384", "RS512",
        "PS256", "PS384", "PS512",
        "ES256", "ES384", "ES512",
        "EdDSA",
    ] = "HS256"  # fmt: skip
    audience: OptionalText = None
    issuer: OptionalText = None
    trust_teacher_user_id: bool = False

    @field_validator("key")
    @classmethod
    def _from_file_or_text(cls, key: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        key_file: Path | None = info.data.get("key_file")
        if key_file is not None:
            if key is not None:
                raise ValueError("set LESSON_AUTH_KEY or LESSON_AUTH_KEY_FILE, not both")
            return SecretStr(read_key_file(key_file))
        if key is not None and key.get_secret_value().lstrip().startswith("-----BEGIN "):
            return SecretStr(key.get_secret_value().replace("\\n", "\n"))
        return key


class MixpanelSettings(Section):
    """Where reconnects are reported.

    Attributes:
        token: the token of the Mixpanel project; None: nothing is sent.
        api_url: the http or https URL that ``/track`` is appended to.
    """

    token: OptionalSecret = None
    api_url: HttpUrl = "https://api.mixpanel.com"


class PresenceSettings(Section):
    """How long Redis keeps a key after the last write to it.

    Attributes:
        retention: seconds; also given as ``7d``, ``12h``, ``30m`` or ``45s``. At most ten years: longer
            than any lesson, and within the range of every Redis.
    """

    retention: Annotated[WholeSeconds, Field(ge=1, le=3_650 * 86_400)] = 7 * 86_400


class SeatsSettings(Section):
    """How long a participant keeps a seat (contract, section 12).

    Attributes:
        grace: seconds for which the seat outlives the participant's last connection in the lesson; also given as
            ``5m`` or ``45s``. 0: the seat goes with the connection.
    """

    grace: Annotated[Seconds, Field(ge=0, le=86_400)] = 60.0


class AdminSettings(Section):
    """Who may use the roster API and the console (contract, sections 10 and 11).

    Attributes:
        token: the token that requests carry. None: both are off, except in the embedded set-up, where both are open to
            requests from this machine if the server listens on a loopback address.
    """

    token: OptionalSecret = None


class Settings(Section):
    """All settings; :func:`lesson_server.settings.sources.load` makes the settings in force."""

    server: ServerSettings = ServerSettings()
    rds: RdsSettings = RdsSettings()
    redis: RedisSettings = RedisSettings()
    auth: AuthSettings = AuthSettings()
    mixpanel: MixpanelSettings = MixpanelSettings()
    presence: PresenceSettings = PresenceSettings()
    seats: SeatsSettings = SeatsSettings()
    admin: AdminSettings = AdminSettings()

    def require_complete(self) -> None:
        """Check what only the command ``run`` needs.

        Raises:
            SettingsError: one store is set without the other, or both without a key.
        """
        if (self.rds.dsn is None) != (self.redis.url is None):
            only = "LESSON_REDIS_URL" if self.rds.dsn is None else "LESSON_RDS_DSN"
            raise SettingsError(f"set both LESSON_RDS_DSN and LESSON_REDIS_URL, or neither: only {only} is set")
        if not self.embedded and self.auth.key is None:
            raise SettingsError("set LESSON_AUTH_KEY or LESSON_AUTH_KEY_FILE: only the embedded set-up generates a key")

    @property
    def embedded(self) -> bool:
        """Whether the server starts its own PostgreSQL and Valkey, because neither is set."""
        return self.rds.dsn is None and self.redis.url is None
