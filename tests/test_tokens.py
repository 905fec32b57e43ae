"""identity.py: which tokens are accepted, which keys, and that nothing else than a refusal comes out."""

import base64
import json
import time
from collections.abc import Callable
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from lesson_server.errors import AccessTokenExpired, AccessTokenInvalid
from lesson_server.settings.schema import AuthSettings, SettingsError
from lesson_server.tokens import MAX_TOKEN_LENGTH, Identity, TokenVerifier, is_role, is_subject

SECRET = "0123456789abcdef" * 4  # as long as the longest hash

RSA_KEY = rsa.generate_private_key(65_537, 2_048)
PRIVATE_KEYS: dict[str, Any] = {
    **dict.fromkeys(["RS256", "RS384", "RS512", "PS256", "PS384", "PS512"], RSA_KEY),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "ES384": ec.generate_private_key(ec.SECP384R1()),
    "ES512": ec.generate_private_key(ec.SECP521R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}


def private_pem(key: Any, encryption: KeySerializationEncryption | None = None) -> str:
    pem: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())
    return pem.decode()


def public_pem(key: Any) -> str:
    pem: bytes = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return pem.decode()


def verifier(key: str | None = SECRET, algorithm: str = "HS256", **others: Any) -> TokenVerifier:
    settings = {"key": None if key is None else SecretStr(key), "algorithm": algorithm, **others}
    return TokenVerifier(AuthSettings.model_validate(settings))


def token(**changes: Any) -> str:
    """A token of our secret; a claim changed to None is left out."""
    claims = {"sub": "p-1", "role": "student", "exp": time.time() + 60, **changes}
    return jwt.encode({name: value for name, value in claims.items() if value is not None}, SECRET)


def refused(who: TokenVerifier, text: object) -> None:
    with pytest.raises(AccessTokenInvalid):
        who.verify(text)


# What is accepted


def test_a_minted_token_tells_who_it_is() -> None:
    who = verifier()
    assert who.verify(who.mint("p-1", "student", ttl=60)) == Identity("p-1", "student")


def test_a_minted_token_lasts_for_its_ttl() -> None:
    claims = jwt.decode(verifier().mint("p-1", "student", ttl=60), SECRET, ["HS256"])
    assert claims["exp"] - claims["iat"] == 60
    assert claims["exp"] == pytest.approx(time.time() + 60, abs=30)


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
def test_each_hmac_algorithm_works(algorithm: str) -> None:
    who = verifier(algorithm=algorithm)
    minted = who.mint("p-1", "student", 60)
    assert who.verify(minted).subject == "p-1"
    assert jwt.decode(minted, SECRET, [algorithm])["sub"] == "p-1"


@pytest.mark.parametrize("algorithm", PRIVATE_KEYS)
def test_a_private_key_signs_and_verifies_and_a_public_key_verifies(algorithm: str) -> None:
    private = verifier(private_pem(PRIVATE_KEYS[algorithm]), algorithm)
    public = verifier(public_pem(PRIVATE_KEYS[algorithm]), algorithm)
    minted = private.mint("t-1", "teacher", 60)
    assert private.verify(minted) == public.verify(minted) == Identity("t-1", "teacher")
    with pytest.raises(SettingsError, match=r"^auth\.key .*: is a public key, which verifies tokens but can't sign"):
        public.mint("t-1", "teacher", 60)


def test_ed448_is_eddsa_too() -> None:
    who = verifier(private_pem(ed448.Ed448PrivateKey.generate()), "EdDSA")
    assert who.verify(who.mint("p-1", "student", 60)).subject == "p-1"


def test_a_short_secret_is_accepted_without_a_warning_but_weak() -> None:
    short = verifier("short")
    assert short.weak
    assert short.verify(short.mint("p-1", "student", 60)).subject == "p-1"
    assert short.verify(jwt.encode({"sub": "p", "role": "r", "exp": 2**33}, b"short".ljust(32, b"\0"))).subject == "p"
    refused(verifier("shorter"), short.mint("p-1", "student", 60))


@pytest.mark.parametrize(
    ("algorithm", "length", "weak"), [("HS256", 31, True), ("HS256", 32, False), ("HS512", 63, True)]
)
def test_weak_means_shorter_than_the_hash(algorithm: str, length: int, weak: bool) -> None:
    assert verifier("k" * length, algorithm).weak is weak


def test_no_pem_is_weak() -> None:
    assert not verifier(public_pem(RSA_KEY), "RS256").weak


@pytest.mark.parametrize(
    "claims", [{"iat": 30}, {"nbf": 30}, {"nbf": -30}, {"iat": 30, "nbf": 30}, {"iat": 7_200, "nbf": 7_200}]
)
def test_the_clock_of_the_issuer_may_be_ahead(claims: dict[str, float]) -> None:
    now = time.time()
    assert verifier().verify(token(**{name: now + ahead for name, ahead in claims.items()})).subject == "p-1"


@pytest.mark.parametrize("claims", [{"nbf": 7_200}, {"iat": 0, "nbf": 7_200}, {"iat": 7_199, "nbf": 7_200}])
def test_a_token_that_is_meant_to_be_good_later_is_refused_until_then(claims: dict[str, float]) -> None:
    now = time.time()
    refused(verifier(), token(**{name: now + ahead for name, ahead in claims.items()}))


# What is refused


def test_an_old_token_has_expired() -> None:
    with pytest.raises(AccessTokenExpired):
        verifier().verify(token(exp=time.time() - 1))
    with pytest.raises(AccessTokenExpired):
        verifier().verify(verifier().mint("p-1", "student", ttl=0))


def test_an_old_token_that_is_not_genuine_has_not_expired() -> None:
    refused(verifier("another secret, of the same length"), token(exp=time.time() - 1))


@pytest.mark.parametrize("claim", ["sub", "role", "exp"])
def test_a_required_claim_is_missed(claim: str) -> None:
    refused(verifier(), token(**{claim: None}))


@pytest.mark.parametrize(
    "changes",
    [
        {"sub": 1},
        {"sub": ""},
        {"sub": "lesson_seat_1"},
        {"role": 1},
        {"role": ["student"]},
        {"role": ""},
        {"role": "r" * 33},
        {"role": "a student"},
        {"role": "élève"},
        {"exp": "soon"},
        {"exp": float("inf")},
        {"exp": float("nan")},
        {"exp": []},
        {"nbf": 2**33},
        {"nbf": "now"},
        {"nbf": []},
        {"nbf": float("nan")},
        {"nbf": float("inf"), "iat": "now"},
    ],
)
def test_a_claim_that_is_none_of_ours_is_refused(changes: dict[str, Any]) -> None:
    refused(verifier(), token(**changes))


@pytest.mark.parametrize(("setting", "claim"), [("audience", "aud"), ("issuer", "iss")])
def test_audience_and_issuer_are_checked_when_they_are_set(setting: str, claim: str) -> None:
    who = verifier(**{setting: "ours"})
    assert who.verify(who.mint("p-1", "student", 60)).subject == "p-1"
    assert who.verify(token(**{claim: "ours"})).subject == "p-1"
    refused(who, token(**{claim: "theirs"}))
    refused(who, token())
    assert verifier().verify(token(**{claim: "theirs"})).subject == "p-1"


def test_one_of_several_audiences_is_enough() -> None:
    assert verifier(audience="ours").verify(token(aud=["theirs", "ours"])).subject == "p-1"


@pytest.mark.parametrize("algorithm", ["HS384", "HS512", "none"])
def test_the_algorithm_is_fixed(algorithm: str) -> None:
    claims = {"sub": "p-1", "role": "student", "exp": 2**33}
    refused(verifier(), jwt.encode(claims, None if algorithm == "none" else SECRET, algorithm))


def segment(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def with_header(header: bytes) -> str:
    return f"{segment(header)}.{segment(b'{}')}.{segment(b'signature')}"


@pytest.mark.parametrize(
    "text",
    [
        None,
        1,
        b"bytes",
        ["list"],
        "",
        ".",
        "..",
        "a.b.c",
        "....",
        "\ud800.\udfff.\ud800",
        "é.é.é",
        "\0",
        "=" * 1_000,
        "a" * 10_000_000,
        with_header(b"[]"),
        with_header(b"{}"),
        with_header(b"\xff\xfe"),
        with_header(b'{"alg": ["HS256"]}'),
        with_header(b'{"alg": {"HS256": 1}}'),
        with_header(b'{"alg": "HS256", "kid": 1}'),
        with_header(b'{"alg": "HS256", "crit": "b64"}'),
        with_header(b'{"alg": "HS256", "b64": false}'),
        with_header(b"[" * 4_000),
        with_header(b'{"alg":' * 500),
        with_header(b"1" * 5_000),
        with_header(b"NaN"),
    ],
)
def test_nonsense_is_refused(text: object) -> None:
    refused(verifier(), text)
    refused(verifier(public_pem(PRIVATE_KEYS["ES256"]), "ES256"), text)


@pytest.mark.without_coverage
@given(st.text() | st.binary().map(segment) | st.lists(st.binary().map(segment), min_size=3, max_size=3).map(".".join))
def test_any_text_is_refused(text: str) -> None:
    refused(WHO, text)


@given(
    st.dictionaries(
        st.sampled_from(["sub", "role", "exp", "nbf", "iat", "aud", "iss", "jti"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda leaf: st.lists(leaf, max_size=3),
        ),
    )
)
def test_any_claims_are_an_identity_or_a_refusal(claims: dict[str, Any]) -> None:
    """A genuine signature does not make the claims good."""
    try:
        identity = WHO.verify(jwt.PyJWS().encode(json.dumps(claims).encode(), SECRET))
    except (AccessTokenInvalid, AccessTokenExpired):
        pass
    else:
        assert is_subject(identity.subject)
        assert is_role(identity.role)


WHO = verifier()


def token_of_length(length: int) -> str:
    """A good one, filled up; four characters of it are three of its claims."""
    _, body, _ = token(exp=2**33, more="").split(".")
    body_length = len(body) + length - len(token(exp=2**33, more=""))
    filled = token(exp=2**33, more="x" * (body_length * 3 // 4 - len(body) * 3 // 4))
    assert len(filled) == length
    return filled


def test_a_token_of_the_greatest_length_is_read() -> None:
    longest, too_long = (token_of_length(MAX_TOKEN_LENGTH + more) for more in (0, 1))
    assert verifier().verify(longest).subject == "p-1"
    refused(verifier(), too_long)


def test_a_changed_token_is_refused() -> None:
    head, body, signature = token().split(".")
    other = segment(json.dumps({"sub": "p-2", "role": "teacher", "exp": 2**33}).encode())
    refused(verifier(), f"{head}.{other}.{signature}")
    refused(verifier(), f"{head}.{body}.")
    refused(verifier(), f"{head}.{body}.{signature}x")


# Keys

SMALL_RSA_KEY = rsa.generate_private_key(65_537, 1_024)
# The number of Ed25519 in the PEM, 1.3.101.112, changed to one that nobody has given away.
OF_AN_UNKNOWN_KIND = public_pem(PRIVATE_KEYS["EdDSA"]).replace("K2Vw", "K2V/", 1)


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [
        (None, "HS256"),
        (public_pem(RSA_KEY), "HS256"),
        (private_pem(RSA_KEY), "HS512"),
        ("-----BEGIN PUBLIC KEY-----", "HS256"),
        ('{"kty": "oct", "k": "c2VjcmV0"}', "HS256"),
        ("ssh-ed25519 AAAA", "HS256"),
        (SECRET, "RS256"),
        (SECRET, "PS256"),
        (SECRET, "ES256"),
        (SECRET, "EdDSA"),
        (public_pem(PRIVATE_KEYS["ES256"]), "RS256"),
        (private_pem(PRIVATE_KEYS["ES256"]), "RS256"),
        (public_pem(PRIVATE_KEYS["ES384"]), "ES256"),
        (private_pem(PRIVATE_KEYS["ES384"]), "ES256"),
        (private_pem(RSA_KEY), "EdDSA"),
        (public_pem(RSA_KEY), "ES512"),
        (private_pem(RSA_KEY, BestAvailableEncryption(b"password")), "RS256"),
        (private_pem(PRIVATE_KEYS["EdDSA"], BestAvailableEncryption(b"password")), "EdDSA"),
        (private_pem(PRIVATE_KEYS["ES256"], BestAvailableEncryption(b"password")), "ES256"),
        (public_pem(SMALL_RSA_KEY), "RS256"),
        (public_pem(SMALL_RSA_KEY), "PS256"),
        (OF_AN_UNKNOWN_KIND, "ES256"),
        (OF_AN_UNKNOWN_KIND, "EdDSA"),
        (private_pem(RSA_KEY).replace("A", "B"), "RS256"),
        ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----", "PS512"),
    ],
)
def test_a_key_that_does_not_fit_is_refused_in_one_line_without_it(key: str | None, algorithm: str) -> None:
    with pytest.raises(SettingsError, match=r"^auth\.key \(LESSON_AUTH_KEY or LESSON_AUTH_KEY_FILE\): ") as fault:
        verifier(key, algorithm)
    assert key is None or key not in str(fault.value)
    assert key is None or algorithm in str(fault.value)
    assert "\n" not in str(fault.value)


# Names


@pytest.mark.parametrize("value", ["1", "a", "Teacher.1:x@y-z_", "x" * 128, "lesson", "Lesson_1", "a_lesson_1"])
def test_a_subject(value: str) -> None:
    assert is_subject(value)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "x" * 129,
        "_a",
        "-a",
        ".a",
        "a b",
        "a\n",
        "\na",
        "a\0",
        "é",
        "٣",
        "a/b",
        "lesson_",
        "lesson_1",
        1,
        None,
        b"a",
        [],
    ],
)
def test_not_a_subject(value: object) -> None:
    assert not is_subject(value)


@pytest.mark.parametrize("value", ["teacher", "Student-1_x", "r" * 32, "_", "-"])
def test_a_role(value: str) -> None:
    assert is_role(value)


@pytest.mark.parametrize("value", ["", "r" * 33, "a b", "a\n", "a.b", "é", None, 1])
def test_not_a_role(value: object) -> None:
    assert not is_role(value)


@pytest.mark.parametrize(
    "mint", [lambda who: who.mint("lesson_1", "teacher", 60), lambda who: who.mint("t-1", "a teacher", 60)]
)
def test_no_token_is_minted_that_would_be_refused(mint: Callable[[TokenVerifier], str]) -> None:
    with pytest.raises(ValueError, match=r"^not a (subject|role): "):
        mint(verifier())
