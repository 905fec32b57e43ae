"""sources.py: where a setting is looked for, and how a mistake is told; and the files of conf/."""

import re
import tomllib
from pathlib import Path

import pytest
from configurations import STORES, WriteToml, fault

from lesson_server.settings.schema import Settings, SettingsError
from lesson_server.settings.sources import MASK, Configuration, load

CONF = Path(__file__).parents[2] / "conf"


def names() -> list[str]:
    return [row.name for row in Configuration().rows()]


# Defaults and precedence


def test_defaults_are_those_of_the_contract() -> None:
    assert {row.name: row.value for row in load(environ={}).rows()} == {
        "server.host": "127.0.0.1",
        "server.port": "8080",
        "server.workers": "1",
        "server.drain": "10.0",
        "server.max_connections": "25000",
        "server.connect_rate": "2500.0",
        "server.join_rate": "2500.0",
        "server.allowed_origins": "",
        "server.data_dir": ".lesson-server",
        "server.log_format": "text",
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
        "seats.grace": "60.0",
        "admin.token": "",
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
    assert load(environ={"PATH": "/bin", "LESSONS": "1", "MY_LESSON_SERVER_PORT": "x"}) == Configuration()


def test_a_key_from_a_file_came_from_that_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("a key\n", "utf-8")
    rows = {row.name: row[1:] for row in load(environ={"LESSON_AUTH_KEY_FILE": str(file)}).rows()}
    assert rows["auth.key"] == (MASK, str(file))
    assert rows["auth.key_file"] == (str(file), "LESSON_AUTH_KEY_FILE")


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


def test_a_wrong_option_is_named() -> None:
    with pytest.raises(SettingsError, match=r"^server\.workers \(--workers\): "):
        load(options={"server.workers": 0}, environ={})


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


@pytest.mark.parametrize("secret", ["rds.dsn", "redis.url", "auth.key", "mixpanel.token", "admin.token"])
def test_production_holds_no_secret(secret: str) -> None:
    section, _, key = secret.partition(".")
    assert key not in tomllib.loads((CONF / "production.toml").read_text("utf-8"))[section]
