"""Every setting of the server: its meaning, its default, its check (contract, section 8).

A setting is named ``section.key``; ``sources.py`` finds its value. A secret is a :class:`~pydantic.SecretStr`, so that
no repr, log or error shows it.
"""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
)


class SettingsError(Exception):
    """A setting is unknown, wrong or missing; the message is one line that names the setting and holds no secret."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # a TOML key or a path may hold a newline


# The checks of values that pydantic has no type for.

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[^\s/?#@:\[\]]+)(:[0-9]{1,5})?")
_HTTP_URL = re.compile(r"https?://[^\s/?#@]+(/[^\s?#]*)?", re.IGNORECASE)
_REDIS_SCHEMES = ("redis", "rediss", "unix", "redis+cluster", "rediss+cluster", "redis+sentinel")
_KEY_PREFIX = re.compile(r"[^{}]*(\{[^{}]+\}[^{}]*)?")
_DURATION = re.compile(r"([0-9]{1,12})([smhd]?)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3_600, "d": 86_400}


def _unset_if_empty(value: object) -> object:
    """Read an empty text as None: only an empty environment variable can unset a value of the TOML file."""
    return None if value == "" else value


def _not_empty(value: object) -> object:
    if value == "":
        raise ValueError("should not be empty")
    return value


def _split_at_commas(value: object) -> object:
    """Split a text at commas, because an environment variable can't hold a list."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _normal_origin(origin: str) -> str:
    """Normalize and check an origin: browsers send lower case without a path, and origins are compared as text."""
    normal = origin.strip().lower().removesuffix("/")
    if normal != "*" and not _ORIGIN.fullmatch(normal):
        raise ValueError('each should be scheme://host or scheme://host:port, or "*" alone')
    return normal


def _star_is_alone(origins: tuple[str, ...]) -> tuple[str, ...]:
    if "*" in origins and len(origins) > 1:
        raise ValueError('"*" allows every origin, so it stands alone')
    return origins


def _names_the_lesson(query: str) -> str:
    if "%(lesson_id)s" not in query:
        raise ValueError("should contain the parameter %(lesson_id)s")
    return query


def _redis_url(url: SecretStr) -> SecretStr:
    scheme, separator, _ = url.get_secret_value().partition("://")
    if not separator or scheme not in _REDIS_SCHEMES:
        raise ValueError(f"should be a URL that begins with {', '.join(f'{known}://' for known in _REDIS_SCHEMES)}")
    return url


def _at_most_one_hash_tag(prefix: str) -> str:
    if not _KEY_PREFIX.fullmatch(prefix):
        raise ValueError("may have braces only as one hash tag, such as {school}")
    return prefix


def _http_url(url: str) -> str:
    if not _HTTP_URL.fullmatch(url):
        raise ValueError("should be an http or https URL without user, query and fragment")
    return url.rstrip("/")


def _in_seconds(value: object) -> object:
    if not isinstance(value, str):
        return value
    match = _DURATION.fullmatch(value.strip())
    if match is None:
        raise ValueError('should be seconds, or a text such as "7d", "12h", "30m", "45s"')
    return int(match[1]) * _SECONDS[match[2]]


def _read_key(path: Path) -> str:
    try:
        key = path.read_text("utf-8").rstrip("\r\n")
    except OSError as error:
        raise ValueError(f"can't read auth.key_file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"auth.key_file {path} is not UTF-8 text") from None
    if not key:
        raise ValueError(f"auth.key_file {path} is empty")
    return key


OptionalText = Annotated[str | None, BeforeValidator(_unset_if_empty)]
OptionalSecret = Annotated[SecretStr | None, BeforeValidator(_unset_if_empty)]


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
    """

    host: Annotated[str, BeforeValidator(_not_empty)] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8080
    workers: Annotated[int, Field(ge=1, le=256)] = 1
    drain: Annotated[float, Field(ge=0, le=600)] = 10.0
    max_connections: Annotated[int, Field(ge=1)] = 25_000
    connect_rate: Annotated[float, Field(ge=0, le=1_000_000)] = 2_500.0
    join_rate: Annotated[float, Field(ge=0, le=1_000_000)] = 2_500.0
    allowed_origins: Annotated[
        tuple[Annotated[str, AfterValidator(_normal_origin)], ...],
        BeforeValidator(_split_at_commas),
        AfterValidator(_star_is_alone),
    ] = ()
    data_dir: Annotated[Path, BeforeValidator(_not_empty)] = Path(".lesson-server")


class RdsSettings(Section):
    """The PostgreSQL that has the lessons.

    Attributes:
        dsn: a libpq connection string or URI. None, and ``redis.url`` None: the embedded set-up.
        lesson_query: one statement that returns the seat count of ``%(lesson_id)s``, or no row (contract, section 6).
        timeout: seconds for one query. At most 3, because a join is answered within 5 s whatever fails.
        pool_size: connections of one worker, open from its start; one further connection is for readiness and probes.
    """

    dsn: OptionalSecret = None
    lesson_query: Annotated[str, AfterValidator(_names_the_lesson)] = (
        "SELECT seat_count FROM lessons WHERE id = %(lesson_id)s"
    )
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

    url: Annotated[Annotated[SecretStr, AfterValidator(_redis_url)] | None, BeforeValidator(_unset_if_empty)] = None
    key_prefix: Annotated[str, AfterValidator(_at_most_one_hash_tag)] = ""
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

    key_file: Annotated[Path | None, BeforeValidator(_unset_if_empty)] = None
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
            return SecretStr(_read_key(key_file))
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
    api_url: Annotated[str, AfterValidator(_http_url)] = "https://api.mixpanel.com"


class PresenceSettings(Section):
    """How long Redis keeps a key after the last write to it.

    Attributes:
        retention: seconds; also given as ``7d``, ``12h``, ``30m`` or ``45s``. At most ten years: longer
            than any lesson, and within the range of every Redis.
    """

    retention: Annotated[int, BeforeValidator(_in_seconds), Field(ge=1, le=3_650 * 86_400)] = 7 * 86_400


class Settings(Section):
    """All settings; :func:`lesson_server.settings.sources.load` makes the settings in force."""

    server: ServerSettings = ServerSettings()
    rds: RdsSettings = RdsSettings()
    redis: RedisSettings = RedisSettings()
    auth: AuthSettings = AuthSettings()
    mixpanel: MixpanelSettings = MixpanelSettings()
    presence: PresenceSettings = PresenceSettings()

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
