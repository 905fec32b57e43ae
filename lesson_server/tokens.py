"""Verifies and mints access tokens; the only module that uses JWT (contract, section 2).

A token is untrusted input. Whatever exception a parser raises for a token, the answer is one of two refusals.
"""

import re
import time
from dataclasses import dataclass
from typing import Any, TypeGuard

import jwt
from cryptography.exceptions import UnsupportedAlgorithm

from lesson_server.errors import AccessTokenExpired, AccessTokenInvalid
from lesson_server.settings.schema import AuthSettings, SettingsError

# Characters. nginx, Apache and Node accept about as much for all headers of a request. The time of decoding grows with
# the length, and decoding comes before the check of the signature.
MAX_TOKEN_LENGTH = 8_192

# Seconds by which the clock of an issuer may be ahead of ours. RFC 7519, 4.1.5: "usually no more than a few minutes".
CLOCK_SKEW = 300.0

# RFC 7518, 3.3: "A key of size 2048 bits or larger MUST be used".
MIN_RSA_BITS = 2_048

# A subject becomes a Redis key. It must not collide with the server's own keys, which all begin with lesson_.
_SUBJECT = re.compile(r"(?!lesson_)[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}")
_ROLE = re.compile(r"[A-Za-z0-9_-]{1,32}")


@dataclass(frozen=True, slots=True)
class Identity:
    """The holder of a verified token: ``subject`` is the user_id of a teacher or the client_id of a participant."""

    subject: str
    role: str


def is_subject(value: object) -> TypeGuard[str]:
    """Return whether a value can be a user_id or client_id (contract, section 2)."""
    return isinstance(value, str) and _SUBJECT.fullmatch(value) is not None


def is_role(value: object) -> TypeGuard[str]:
    """Return whether a value can be the role of a token (contract, section 2)."""
    return isinstance(value, str) and _ROLE.fullmatch(value) is not None


class TokenVerifier:
    """Verifies access tokens and mints them, with one key and one algorithm.

    Args:
        auth: the key, the algorithm, and the audience and issuer that a token must have.

    Raises:
        SettingsError: there is no key, or the key does not fit the algorithm.
    """

    def __init__(self, auth: AuthSettings) -> None:
        if auth.key is None:
            raise _key_error("is not set")
        self._algorithm = auth.algorithm
        self._audience = auth.audience
        self._issuer = auth.issuer
        self._weak = False
        # PyJWT's type of a key depends on the algorithm, which is known only at run time.
        self._signing_key: Any
        self._verifying_key: Any
        key = _prepared_key(auth.key.get_secret_value(), auth.algorithm)
        if isinstance(key, bytes):
            hash_size = int(auth.algorithm.removeprefix("HS")) // 8
            self._weak = len(key) < hash_size
            # The HMAC is the same: it pads with zeros itself (RFC 2104). PyJWT would warn at each use of a shorter key.
            self._signing_key = self._verifying_key = key.ljust(hash_size, b"\0")
        elif hasattr(key, "public_key"):
            self._signing_key, self._verifying_key = key, key.public_key()
        else:
            self._signing_key, self._verifying_key = None, key
        self._jwt = jwt.PyJWT(
            {
                "require": ["exp", "sub", "role"],
                "verify_aud": auth.audience is not None,  # otherwise PyJWT refuses a token that has an aud
                # PyJWT would refuse the fresh tokens of an issuer whose clock is a second ahead; see _is_valid_yet.
                "verify_iat": False,
                "verify_nbf": False,
            }
        )

    @property
    def weak(self) -> bool:
        """Whether the key is an HMAC secret shorter than the hash, against RFC 7518, 3.2; it causes only a warning."""
        return self._weak

    def verify(self, token: object, /) -> Identity:
        """Return the holder of a token ("get client_id by the token" in the participant's diagram).

        Args:
            token: what the client sent as ``access_token``.

        Raises:
            AccessTokenExpired: the token is genuine, but past its ``exp``.
            AccessTokenInvalid: any other fault.
        """
        if not isinstance(token, str) or len(token) > MAX_TOKEN_LENGTH:
            raise AccessTokenInvalid
        try:
            claims = self._jwt.decode(
                token, self._verifying_key, [self._algorithm], audience=self._audience, issuer=self._issuer
            )
        except jwt.ExpiredSignatureError:
            raise AccessTokenExpired from None
        except Exception as fault:  # not only PyJWTError: PyJWT has raised Unicode, recursion and overflow errors
            raise AccessTokenInvalid from fault
        if not _is_valid_yet(claims):
            raise AccessTokenInvalid
        subject, role = claims["sub"], claims["role"]
        if not (is_subject(subject) and is_role(role)):
            raise AccessTokenInvalid
        return Identity(subject, role)

    def mint(self, subject: str, role: str, ttl: int) -> str:
        """Sign a token that :meth:`verify` accepts (``lesson-server token``).

        Args:
            subject: the user_id or client_id.
            role: ``teacher``, or any role of a participant.
            ttl: seconds until it expires.

        Raises:
            ValueError: a token can't have this subject or role.
            SettingsError: the key is a public key.
        """
        if not is_subject(subject):
            raise ValueError(f"not a subject: {subject!r} (it matches {_SUBJECT.pattern})")
        if not is_role(role):
            raise ValueError(f"not a role: {role!r} (it matches {_ROLE.pattern})")
        if self._signing_key is None:
            raise _key_error("is a public key, which verifies tokens but can't sign them")
        now = int(time.time())
        claims = {"sub": subject, "role": role, "iat": now, "exp": now + ttl}
        if self._audience is not None:
            claims["aud"] = self._audience
        if self._issuer is not None:
            claims["iss"] = self._issuer
        return self._jwt.encode(claims, self._signing_key, self._algorithm)


def _is_valid_yet(claims: dict[str, Any]) -> bool:
    """Return whether ``nbf`` has passed, by our clock or, when the token was issued, by the issuer's clock.

    An issuer whose clock is ahead sets both ``iat`` and ``nbf`` in our future; such a token is valid at once. A token
    that is meant to become valid later has an ``nbf`` after its ``iat``.
    """
    if "nbf" not in claims:
        return True
    not_before, issued = claims["nbf"], claims.get("iat")
    if not isinstance(not_before, int | float):
        return False
    return not_before <= time.time() + CLOCK_SKEW or (isinstance(issued, int | float) and not_before <= issued)


def _prepared_key(text: str, algorithm: str) -> Any:
    """Return the key in PyJWT's form, parsed once: bytes for HMAC, otherwise a key object of cryptography.

    Raises:
        SettingsError: the key does not fit the algorithm. A PEM is refused as an HMAC secret: it may be public, and
            whoever knows it could then sign tokens.
    """
    try:
        key = jwt.get_algorithm_by_name(algorithm).prepare_key(text)
    except (jwt.PyJWTError, UnsupportedAlgorithm, TypeError, ValueError):
        key = None
    if algorithm.startswith("HS"):
        if key is None or "-----BEGIN " in text:
            raise _key_error(f"{algorithm} needs a secret, which a PEM, SSH or JWK key is not")
    elif key is None:
        raise _key_error(f"{algorithm} needs a PEM, not encrypted, of a key of its own kind")
    elif algorithm.startswith(("RS", "PS")) and key.key_size < MIN_RSA_BITS:
        raise _key_error(f"{algorithm} needs an RSA key of {MIN_RSA_BITS} bits or more; this one has {key.key_size}")
    return key


def _key_error(fault: str) -> SettingsError:
    return SettingsError(f"auth.key (LESSON_AUTH_KEY or LESSON_AUTH_KEY_FILE): {fault}")
