"""Finds the settings, and records the origin of each (contract, section 8).

A value is looked for on the command line, then in the environment as ``LESSON_<SECTION>_<KEY>``, then in the TOML
file; otherwise it is the default in ``schema.py``. An unknown or wrong setting stops the start with one line that names
the setting.
"""

import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from pydantic import PrivateAttr, SecretStr, ValidationError

from lesson_server.settings.schema import Section, Settings, SettingsError

ENV_PREFIX = "LESSON_"
DEFAULT = "default"
MASK = "********"


# The key of the access tokens, and the file that holds the key.
KEY_SETTINGS = {"auth.key", "auth.key_file"}


class Row(NamedTuple):
    """One setting for display: ``origin`` is ``default``, a file, an environment variable or an option."""

    name: str
    value: str
    origin: str


class Configuration(Settings):
    """The settings in force and their origins; made by :func:`load`."""

    _origins: Mapping[str, str] = PrivateAttr(default_factory=dict)

    def rows(self) -> Iterator[Row]:
        """Return every setting with its value and origin, secrets masked: what ``lesson-server settings`` prints."""
        for section_name, section in self:
            for key, value in section:
                name = f"{section_name}.{key}"
                yield Row(name, _shown(value), self._origins.get(name, DEFAULT))


def _shown(value: object) -> str:
    """Return a value as an environment variable would hold it, with a secret masked."""
    match value:
        case None:
            return ""
        case SecretStr():
            return MASK
        case tuple():
            return ",".join(value)
        case _:
            return str(value)


class _Found(NamedTuple):
    value: object
    origin: str


def load(
    config: Path | None = None,
    options: Mapping[str, object] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Configuration:
    """Find every setting and check it (contract, section 8).

    Args:
        config: the TOML file of ``--config``.
        options: name of a setting → value of its command-line option: ``{"server.port": 80}`` is ``--port 80``. The
            value None means that the option was not given.
        environ: the environment.

    Raises:
        SettingsError: the file can't be read, or a setting is unknown, wrong or missing.
    """
    from_file = _from_file(config) if config is not None else {}
    from_environment = _from_environment(environ)
    if KEY_SETTINGS & from_environment.keys():  # alternatives: either one overrides both of the file
        from_file = {name: entry for name, entry in from_file.items() if name not in KEY_SETTINGS}
    found = {**from_file, **from_environment, **_from_options(options or {})}
    values: dict[str, dict[str, object]] = {}
    for name, (value, origin) in found.items():
        section, _, key = name.partition(".")
        if section not in Settings.model_fields or key not in _keys_of(section):
            raise SettingsError(f"{name} ({origin}): there is no such setting")
        values.setdefault(section, {})[key] = value
    origins = {name: origin for name, (_, origin) in found.items()}
    try:
        configuration = Configuration.model_validate(values)
    except ValidationError as error:
        # Not chained: pydantic's own text shows the value, which may be a secret.
        raise SettingsError(_first_line(error, origins)) from None
    if configuration.auth.key_file is not None:
        origins["auth.key"] = str(configuration.auth.key_file)
    configuration._origins = origins
    return configuration


def _keys_of(section: str) -> Mapping[str, object]:
    default: Section = Settings.model_fields[section].default
    return type(default).model_fields


def _from_file(path: Path) -> dict[str, _Found]:
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SettingsError(f"can't read {path}: {error.strerror}") from None
    except ValueError as error:  # invalid TOML, or invalid UTF-8
        raise SettingsError(f"{path} is not TOML: {error}") from None
    found = {}
    for section, table in tables.items():
        if section not in Settings.model_fields or not isinstance(table, dict):
            sections = ", ".join(f"[{known}]" for known in Settings.model_fields)
            raise SettingsError(f"{section} ({path}): should be one of the tables {sections}")
        for key, value in table.items():
            found[f"{section}.{key}"] = _Found(value, str(path))
    return found


def _from_environment(environ: Mapping[str, str]) -> dict[str, _Found]:
    found = {}
    for variable, value in environ.items():
        if variable.startswith(ENV_PREFIX):
            found[variable.removeprefix(ENV_PREFIX).lower().replace("_", ".", 1)] = _Found(value, variable)
    return found


def _from_options(options: Mapping[str, object]) -> dict[str, _Found]:
    return {
        name: _Found(value, "--" + name.partition(".")[2].replace("_", "-"))
        for name, value in options.items()
        if value is not None
    }


def _first_line(error: ValidationError, origins: Mapping[str, str]) -> str:
    """Return the first fault, with the name and the origin of the setting.

    The message of a fault between settings names them itself.
    """
    fault = error.errors(include_url=False, include_input=False)[0]
    message = fault["msg"].removeprefix("Value error, ")
    if not fault["loc"]:
        return message
    name = ".".join(map(str, fault["loc"][:2]))  # a third part is the index in a list
    origin = origins.get(name, ENV_PREFIX + name.replace(".", "_").upper())
    return f"{name} ({origin}): {message}"
