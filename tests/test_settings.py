"""settings.py: what may be set, where it is looked for, and how a mistake is told."""

import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from lesson_server.settings import MASK, Settings, SettingsError, load

CONF = Path(__file__).parent.parent / "conf"
STORES = {"LESSON_RDS_DSN": "dbname=lesson", "LESSON_REDIS_URL": "redis://localhost", "LESSON_AUTH_KEY": "key-" * 8}

WriteToml = Callable[[str], Path]


@pytest.fixture
def toml(tmp_path: Path) -> WriteToml:
    def write(text: str) -> Path:
        path = tmp_path / "settings.toml"
        path.write_text(text, "utf-8")
        return path

    return write


def fault(environ: dict[str, str], config: Path | None = None) -> str:
    """The text of the refusal, which is one line."""
    with pytest.raises(SettingsError) as refused:
        load(config, environ=environ)
    assert refused.value.__cause__ is None
    assert refused.value.__suppress_context__ or refused.value.__context__ is None
    assert "\n" not in str(refused.value)
    return str(refused.value)


def names() -> list[str]:
    return [row.name for row in Settings().rows()]


# Defaults and precedence


def test_defaults_are_those_of_the_contract() -> None:
    assert {row.name: row.value for row in load(environ={}).rows()} == {
        "server.host": "127.0.0.1",
        "server.port": "8080",
        "server.workers": "1",
        "server.allowed_origins": "",
        "server.data_dir": ".lesson-server",
        "rds.dsn": "",
        "rds.lesson_query": "SELECT seat_count FROM lessons WHERE id = %(lesson_id)s",
        "rds.timeout": "2.0",
        "rds.pool_size": "4",
        "redis.url": "",
        "redis.key_prefix": "",
        "redis.timeout": "2.0",
        "redis.pool_size": "16",
        "auth.key_file": "",
        "auth.key": "",
        "auth.algorithm": "HS256",
        "auth.audience": "",
        "auth.issuer": "",
        "auth.trust_teacher_user_id": "False",
        "mixpanel.token": "",
        "mixpanel.api_url": "https://api.mixpanel.com",
        "presence.retention": "604800",
    }


def test_every_setting_has_an_environment_variable() -> None:
    wrong = {name: f"LESSON_{name.replace('.', '_').upper()}" for name in names()}
    for name, variable in wrong.items():
        environ = {**STORES, variable: "1"}
        try:
            rows = {row.name: row.origin for row in load(environ=environ).rows()}
        except SettingsError as error:
            assert name in str(error) or variable in str(error)  # noqa: PT017
        else:
            assert rows[name] == variable


def test_the_command_line_wins_over_the_environment_over_the_file_over_the_default(toml: WriteToml) -> None:
    config = toml('[server]\nhost = "file"\nport = 1\nworkers = 2\n')
    environ = {"LESSON_SERVER_HOST": "environment", "LESSON_SERVER_PORT": "2"}
    settings = load(config, {"server.host": "option", "server.port": None}, environ)
    rows = {row.name: row[1:] for row in settings.rows()}
    assert rows["server.host"] == ("option", "--host")
    assert rows["server.port"] == ("2", "LESSON_SERVER_PORT")
    assert rows["server.workers"] == ("2", str(config))
    assert rows["server.data_dir"] == (".lesson-server", "default")


def test_other_variables_are_left_alone() -> None:
    assert load(environ={"PATH": "/bin", "LESSONS": "1", "MY_LESSON_SERVER_PORT": "x"}) == Settings()


def test_settings_never_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().server.port = 1


# Unknown and wrong


@pytest.mark.parametrize("variable", ["LESSON_SERVER_PROT", "LESSON_STORE_URL", "LESSON_PORT", "LESSON_", "LESSON_RDS"])
def test_an_unknown_variable_is_named(variable: str) -> None:
    assert f"({variable}): there is no such setting" in fault({variable: "1"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[server]\nprot = 1", "server.prot ({path}): there is no such setting"),
        ("[server.tls]\nkey = 1", "server.tls ({path}): there is no such setting"),
        ('[server]\n"a\\nb" = 1', "server.a b ({path}): there is no such setting"),
        ("[store]", "store ({path}): should be one of the tables [server], [rds],"),
        ("port = 1", "port ({path}): should be one of the tables"),
        ("server = 1", "server ({path}): should be one of the tables"),
        ("[server]\nport = 'x'", "server.port ({path}): Input should be a valid integer"),
        ("[server]\nport = 70000", "server.port ({path}): Input should be less than or equal to 65535"),
        ("[server", "{path} is not TOML:"),
    ],
)
def test_a_fault_in_the_file_is_named(toml: WriteToml, text: str, message: str) -> None:
    config = toml(text)
    assert fault({}, config).startswith(message.format(path=config))


def test_a_file_that_is_missing_or_no_text_is_named(tmp_path: Path) -> None:
    assert fault({}, tmp_path / "none.toml") == f"can't read {tmp_path}/none.toml: No such file or directory"
    (tmp_path / "bytes.toml").write_bytes(b"\xff")
    assert fault({}, tmp_path / "bytes.toml").startswith(f"{tmp_path}/bytes.toml is not TOML:")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("server.host", ""),
        ("server.port", ""),
        ("server.port", "-1"),
        ("server.workers", "0"),
        ("server.allowed_origins", "*,https://example.com"),
        ("server.allowed_origins", "example.com"),
        ("server.allowed_origins", "https://example.com/path"),
        ("server.allowed_origins", "https://user@example.com"),
        ("server.data_dir", ""),
        ("rds.lesson_query", "SELECT 1"),
        ("rds.timeout", "0"),
        ("rds.timeout", "3.1"),
        ("rds.timeout", "nan"),
        ("rds.pool_size", "0"),
        ("rds.pool_size", "101"),
        ("redis.url", "localhost:6379"),
        ("redis.url", "http://localhost"),
        ("redis.timeout", "2.5"),
        ("redis.timeout", "inf"),
        ("redis.pool_size", "0"),
        ("auth.algorithm", "none"),
        ("auth.algorithm", "HS1"),
        ("auth.trust_teacher_user_id", "perhaps"),
        ("mixpanel.api_url", "api.mixpanel.com"),
        ("mixpanel.api_url", "ftp://api.mixpanel.com"),
        ("mixpanel.api_url", "https://user:password@api.mixpanel.com"),
        ("mixpanel.api_url", ""),
        ("presence.retention", "0"),
        ("presence.retention", "-7d"),
        ("presence.retention", "7w"),
        ("presence.retention", "1d12h"),
        ("presence.retention", "4000d"),
        ("presence.retention", ""),
    ],
)
def test_a_wrong_value_is_named(name: str, value: str) -> None:
    variable = f"LESSON_{name.replace('.', '_').upper()}"
    assert fault({**STORES, variable: value}).startswith(f"{name} ({variable}): ")


def test_a_wrong_option_is_named() -> None:
    with pytest.raises(SettingsError, match=r"^server\.workers \(--workers\): "):
        load(options={"server.workers": 0}, environ={})


# Values


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


def test_retention_is_seconds_when_it_is_a_number(toml: WriteToml) -> None:
    assert load(toml("[presence]\nretention = 60"), environ={}).presence.retention == 60


def test_an_empty_variable_unsets_what_may_be_unset(toml: WriteToml) -> None:
    config = toml(
        '[rds]\ndsn = "x"\n[redis]\nurl = "redis://x"\n[auth]\nkey = "x"\naudience = "x"\nissuer = "x"\n'
        '[mixpanel]\ntoken = "x"\n'
    )
    optional = ["RDS_DSN", "REDIS_URL", "AUTH_KEY", "AUTH_KEY_FILE", "AUTH_AUDIENCE", "AUTH_ISSUER", "MIXPANEL_TOKEN"]
    assert load(config, environ={}) != Settings()
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


# The stores come together


def test_embedded_means_that_neither_store_is_given() -> None:
    assert load(environ={}).embedded
    assert not load(environ=STORES).embedded


@pytest.mark.parametrize("only", ["LESSON_RDS_DSN", "LESSON_REDIS_URL"])
def test_one_store_alone_is_refused(only: str) -> None:
    assert fault({only: STORES[only], "LESSON_AUTH_KEY": "x"}) == (
        f"set both LESSON_RDS_DSN and LESSON_REDIS_URL, or neither: only {only} is set"
    )


def test_stores_without_a_key_are_refused() -> None:
    assert fault({**STORES, "LESSON_AUTH_KEY": ""}).startswith("set LESSON_AUTH_KEY or LESSON_AUTH_KEY_FILE:")


# The key


def key_of(environ: dict[str, str]) -> str:
    key = load(environ=environ).auth.key
    assert key is not None
    return key.get_secret_value()


def test_a_key_file_is_read_without_its_last_newline(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(" a key\n", "utf-8")
    environ = {"LESSON_AUTH_KEY_FILE": str(file)}
    assert key_of(environ) == " a key"
    assert key_of({**environ, "LESSON_AUTH_KEY": ""}) == " a key"
    rows = {row.name: row[1:] for row in load(environ=environ).rows()}
    assert rows["auth.key"] == (MASK, str(file))
    assert rows["auth.key_file"] == (str(file), "LESSON_AUTH_KEY_FILE")


def test_a_key_file_that_gives_no_key_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "key"
    environ = {"LESSON_AUTH_KEY_FILE": str(file)}
    assert f"can't read auth.key_file {file}: No such file or directory" in fault(environ)
    file.write_bytes(b"\n")
    assert f"auth.key_file {file} is empty" in fault(environ)
    file.write_bytes(b"\xff\xfe")
    assert f"auth.key_file {file} is not UTF-8 text" in fault(environ)


def test_a_key_and_a_key_file_exclude_each_other(tmp_path: Path) -> None:
    assert "not both" in fault({"LESSON_AUTH_KEY": "x", "LESSON_AUTH_KEY_FILE": str(tmp_path / "key")})


def test_a_pem_may_have_its_newlines_written_out() -> None:
    assert key_of({"LESSON_AUTH_KEY": r"-----BEGIN PUBLIC KEY-----\nAA==\n-----END PUBLIC KEY-----\n"}) == (
        "-----BEGIN PUBLIC KEY-----\nAA==\n-----END PUBLIC KEY-----\n"
    )
    assert key_of({"LESSON_AUTH_KEY": r"a secret\n"}) == r"a secret\n"


# Secrets


SECRETS = {
    "LESSON_RDS_DSN": "host=db password=hunter2",
    "LESSON_REDIS_URL": "redis://:hunter2@redis",
    "LESSON_AUTH_KEY": "hunter2",
    "LESSON_MIXPANEL_TOKEN": "hunter2",
}


def test_secrets_are_never_shown() -> None:
    settings = load(environ=SECRETS)
    assert "hunter2" not in f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"
    shown = {row.origin: row.value for row in settings.rows() if row.origin in SECRETS}
    assert shown == dict.fromkeys(SECRETS, MASK)


@pytest.mark.parametrize("url", ["hunter2://redis", "redis:hunter2@", "http://[hunter2"])
def test_a_wrong_secret_is_not_quoted(toml: WriteToml, url: str) -> None:
    assert "hunter2" not in fault({**SECRETS, "LESSON_REDIS_URL": url})
    assert "hunter2" not in fault({**SECRETS, "LESSON_AUTH_KEY": ""})
    assert "hunter2" not in fault({}, toml('[auth]\nkey = ["hunter2"]'))
    assert "hunter2" not in fault({}, toml('[auth]\nkey = "hunter2'))


# conf/


def test_development_is_the_default() -> None:
    assert load(CONF / "development.toml", environ={}).model_dump() == Settings().model_dump()


def test_production_loads_with_its_secrets_from_the_environment() -> None:
    settings = load(CONF / "production.toml", environ=SECRETS)
    assert not settings.embedded
    assert not settings.auth.trust_teacher_user_id


@pytest.mark.parametrize("file", ["development.toml", "production.toml"])
def test_each_file_explains_every_setting_once(file: str) -> None:
    text = (CONF / file).read_text("utf-8")
    # A commented-out setting is "# key = value"; with the marks off, the file is TOML that holds every setting.
    whole = tomllib.loads(re.sub(r"^# (?=[a-z_]+ = )", "", text, flags=re.MULTILINE))
    written = [f"{section}.{key}" for section, keys in whole.items() for key in keys]
    assert sorted(written) == sorted(names())
    for name in names():
        assert len(re.findall(rf"\bLESSON_{name.replace('.', '_').upper()}\b", text)) == 1, name


@pytest.mark.parametrize("secret", ["rds.dsn", "redis.url", "auth.key", "mixpanel.token"])
def test_production_holds_no_secret(secret: str) -> None:
    section, _, key = secret.partition(".")
    assert key not in tomllib.loads((CONF / "production.toml").read_text("utf-8"))[section]
