"""schema.py: what may be set, and to what."""

from pathlib import Path

import pytest
from configurations import STORES, fault

from lesson_server.settings.schema import Settings
from lesson_server.settings.sources import load


def test_settings_never_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().server.port = 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("server.port", ""),
        ("server.port", "-1"),
        ("server.workers", "0"),
        ("rds.timeout", "0"),
        ("rds.timeout", "3.1"),
        ("rds.timeout", "nan"),
        ("rds.pool_size", "0"),
        ("rds.pool_size", "101"),
        ("redis.timeout", "2.5"),
        ("redis.timeout", "inf"),
        ("redis.pool_size", "0"),
        ("auth.algorithm", "none"),
        ("auth.algorithm", "HS1"),
        ("auth.trust_teacher_user_id", "perhaps"),
        ("presence.retention", "0"),
        ("presence.retention", "4000d"),
        ("presence.retention", "1.5"),
        ("seats.grace", "-1"),
        ("seats.grace", "2d"),
        ("seats.grace", "nan"),
    ],
)
def test_a_wrong_value_is_named(name: str, value: str) -> None:
    variable = f"LESSON_{name.replace('.', '_').upper()}"
    assert fault({**STORES, variable: value}).startswith(f"{name} ({variable}): ")


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


def test_a_key_and_a_key_file_exclude_each_other(tmp_path: Path) -> None:
    assert "not both" in fault({"LESSON_AUTH_KEY": "x", "LESSON_AUTH_KEY_FILE": str(tmp_path / "key")})


def test_a_pem_may_have_its_newlines_written_out() -> None:
    assert key_of({"LESSON_AUTH_KEY": r"-----BEGIN PUBLIC KEY-----\nAA==\n-----END PUBLIC KEY-----\n"}) == (
        "-----BEGIN PUBLIC KEY-----\nAA==\n-----END PUBLIC KEY-----\n"
    )
    assert key_of({"LESSON_AUTH_KEY": r"a secret\n"}) == r"a secret\n"
