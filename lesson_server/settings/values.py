"""The types of settings that pydantic does not have, and their checks.

A check raises ValueError. The message follows the name of the setting, and holds no secret.
"""

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, SecretStr

# The checks.

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[^\s/?#@:\[\]]+)(:[0-9]{1,5})?")
_HTTP_URL = re.compile(r"https?://[^\s/?#@]+(/[^\s?#]*)?", re.IGNORECASE)
_REDIS_SCHEMES = ("redis", "rediss", "unix", "redis+cluster", "rediss+cluster", "redis+sentinel")
_KEY_PREFIX = re.compile(r"[^{}]*(\{[^{}]+\}[^{}]*)?")
_DURATION = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,3})?)([smhd]?)")
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
    return float(match[1]) * _SECONDS[match[2]]


# The types. A BeforeValidator sees the value as it was given, an AfterValidator the value that pydantic has made of it.

NonEmptyText = Annotated[str, BeforeValidator(_not_empty)]
NonEmptyPath = Annotated[Path, BeforeValidator(_not_empty)]
OptionalText = Annotated[str | None, BeforeValidator(_unset_if_empty)]
OptionalPath = Annotated[Path | None, BeforeValidator(_unset_if_empty)]
OptionalSecret = Annotated[SecretStr | None, BeforeValidator(_unset_if_empty)]
Origin = Annotated[str, AfterValidator(_normal_origin)]
Origins = Annotated[tuple[Origin, ...], BeforeValidator(_split_at_commas), AfterValidator(_star_is_alone)]
LessonQuery = Annotated[str, AfterValidator(_names_the_lesson)]
RedisUrl = Annotated[SecretStr, AfterValidator(_redis_url)]
OptionalRedisUrl = Annotated[RedisUrl | None, BeforeValidator(_unset_if_empty)]
KeyPrefix = Annotated[str, AfterValidator(_at_most_one_hash_tag)]
HttpUrl = Annotated[str, AfterValidator(_http_url)]
Seconds = Annotated[float, BeforeValidator(_in_seconds)]
WholeSeconds = Annotated[int, BeforeValidator(_in_seconds)]


# The file of the key.


def read_key_file(path: Path) -> str:
    """Return the key that ``auth.key_file`` holds, without the newline at the end of the file.

    Raises:
        ValueError: the file can't be read, or holds no key.
    """
    try:
        key = path.read_text("utf-8").rstrip("\r\n")
    except OSError as error:
        raise ValueError(f"can't read auth.key_file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"auth.key_file {path} is not UTF-8 text") from None
    if not key:
        raise ValueError(f"auth.key_file {path} is empty")
    return key
