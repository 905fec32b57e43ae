"""values.py: which values are refused, and what the others are normalized to."""

from pathlib import Path

import pytest
from configurations import STORES, WriteToml, fault

from lesson_server.settings.schema import Settings
from lesson_server.settings.sources import load


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("server.host", ""),
        ("server.allowed_origins", "*,https://example.com"),
        ("server.allowed_origins", "example.com"),
        ("server.allowed_origins", "https://example.com/path"),
        ("server.allowed_origins", "https://user@example.com"),
        ("server.data_dir", ""),
        ("rds.lesson_query", "SELECT 1"),
        ("redis.url", "localhost:6379"),
        ("redis.url", "http://localhost"),
        ("redis.key_prefix", "{}"),
        ("redis.key_prefix", "{a}{b}"),
        ("redis.key_prefix", "a{b"),
        ("mixpanel.api_url", "api.mixpanel.com"),
        ("mixpanel.api_url", "ftp://api.mixpanel.com"),
        ("mixpanel.api_url", "https://user:password@api.mixpanel.com"),
        ("mixpanel.api_url", ""),
        ("presence.retention", "-7d"),
        ("presence.retention", "7w"),
        ("presence.retention", "1d12h"),
        ("presence.retention", ""),
    ],
)
def test_a_wrong_value_is_named(name: str, value: str) -> None:
    variable = f"LESSON_{name.replace('.', '_').upper()}"
    assert fault({**STORES, variable: value}).startswith(f"{name} ({variable}): ")


@pytest.mark.parametrize(
    ("given", "origins"),
    [
        ("", ()),
        ("*", ("*",)),
        ("HTTPS://Example.COM/", ("https://example.com",)),
        ("https://a.example, http://localhost:3000 ,", ("https://a.example", "http://localhost:3000")),
        ("http://[::1]:3000,capacitor://localhost", ("http://[::1]:3000", "capacitor://localhost")),
    ],
)
def test_origins_are_compared_as_browsers_send_them(given: str, origins: tuple[str, ...]) -> None:
    assert load(environ={"LESSON_SERVER_ALLOWED_ORIGINS": given}).server.allowed_origins == origins


def test_origins_are_a_list_in_the_file(toml: WriteToml) -> None:
    config = toml('[server]\nallowed_origins = ["https://a.example", "https://b.example/"]')
    assert load(config, environ={}).server.allowed_origins == ("https://a.example", "https://b.example")


@pytest.mark.parametrize(
    ("given", "seconds"), [("7d", 604_800), ("12h", 43_200), ("30m", 1_800), ("45s", 45), ("90", 90)]
)
def test_retention_is_given_with_or_without_a_unit(toml: WriteToml, given: str, seconds: int) -> None:
    assert load(environ={"LESSON_PRESENCE_RETENTION": given}).presence.retention == seconds
    assert load(toml(f'[presence]\nretention = "{given}"'), environ={}).presence.retention == seconds


@pytest.mark.parametrize(("given", "seconds"), [("0", 0), ("0.5", 0.5), ("1.5m", 90), ("60s", 60)])
def test_the_grace_of_a_seat_may_have_a_fraction(given: str, seconds: float) -> None:
    assert load(environ={"LESSON_SEATS_GRACE": given}).seats.grace == seconds


def test_retention_is_seconds_when_it_is_a_number(toml: WriteToml) -> None:
    assert load(toml("[presence]\nretention = 60"), environ={}).presence.retention == 60


def test_an_empty_variable_unsets_what_may_be_unset(toml: WriteToml) -> None:
    config = toml(
        '[rds]\ndsn = "x"\n[redis]\nurl = "redis://x"\n[auth]\nkey = "x"\naudience = "x"\nissuer = "x"\n'
        '[mixpanel]\ntoken = "x"\n'
    )
    optional = ["RDS_DSN", "REDIS_URL", "AUTH_KEY", "AUTH_KEY_FILE", "AUTH_AUDIENCE", "AUTH_ISSUER", "MIXPANEL_TOKEN"]
    assert load(config, environ={}).model_dump() != Settings().model_dump()
    unset = load(config, environ={f"LESSON_{name}": "" for name in optional})
    assert unset.model_dump() == Settings().model_dump()


def test_the_api_url_has_no_slash_at_its_end() -> None:
    settings = load(environ={"LESSON_MIXPANEL_API_URL": "http://localhost:1/mixpanel/"})
    assert settings.mixpanel.api_url == "http://localhost:1/mixpanel"


@pytest.mark.parametrize("url", ["redis://localhost", "rediss://:secret@redis:6380/1", "unix:///run/redis.sock"])
def test_redis_may_be_reached_in_each_way(url: str) -> None:
    settings = load(environ={**STORES, "LESSON_REDIS_URL": url})
    assert settings.redis.url is not None
    assert settings.redis.url.get_secret_value() == url


def test_a_key_file_that_gives_no_key_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "key"
    environ = {"LESSON_AUTH_KEY_FILE": str(file)}
    assert f"can't read auth.key_file {file}: No such file or directory" in fault(environ)
    file.write_bytes(b"\n")
    assert f"auth.key_file {file} is empty" in fault(environ)
    file.write_bytes(b"\xff\xfe")
    assert f"auth.key_file {file} is not UTF-8 text" in fault(environ)
