"""Bearer tokens (RFC 6750): what a cloud accepts, and where an edge sends one."""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Sequence
from http import HTTPStatus

TOKEN = "SPEC_ENVS_TOKEN"  # environment variable with the token; an argument would be seen in lists of processes
SHORTEST = 16  # characters of a token that cannot be guessed
FORM = re.compile(r"[A-Za-z0-9\-._~+/]+=*")
CHALLENGE = 'Bearer realm="spec-envs"'


def is_loopback(host: str) -> bool:
    """Return True if an address can be reached only from this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_token(token: str) -> None:
    """Refuse a token that cannot be sent in a header; an empty token means that there is none.

    Raises:
        ValueError: it has characters that RFC 6750 does not allow.
    """
    if token and not FORM.fullmatch(token):
        raise ValueError(
            f"the token in {TOKEN} has characters that no bearer token may have; expected letters, digits and -._~+/"
        )


def check_served(token: str, host: str) -> None:
    """Refuse to serve other machines without a token that is hard to guess.

    Raises:
        ValueError: there is no token, it is too short, or it cannot be sent in a header.
    """
    check_token(token)
    if is_loopback(host):
        return
    if not token:
        raise ValueError(
            f"host is {host}, which others can reach; set the environment variable {TOKEN} to a secret that edges "
            "have to send, or listen on 127.0.0.1"
        )
    if len(token) < SHORTEST:
        raise ValueError(
            f"the token in {TOKEN} has {len(token)} characters, and others can reach {host}; "
            f"expected {SHORTEST} or more, for example from `openssl rand -hex 16`"
        )


def denied(given: Sequence[str], token: str) -> tuple[HTTPStatus, str, str] | None:
    """Return status, challenge and body of the response to a request that is not authorized, or None if it is.

    Args:
        given: the request's Authorization headers.
        token: the cloud's own token; if it is empty, every request is authorized.
    """
    if len(given) > 1:
        challenge = f'{CHALLENGE}, error="invalid_request"'
        return HTTPStatus.BAD_REQUEST, challenge, "expected one Authorization header\n"
    if not token:
        return None
    scheme, _, value = given[0].strip().partition(" ") if given else ("", "", "")
    sentence = "expected Authorization: Bearer and the cloud's token\n"
    if scheme.lower() != "bearer":  # RFC 6750, 3.1: no error code if no token was given
        return HTTPStatus.UNAUTHORIZED, CHALLENGE, sentence
    if not hmac.compare_digest(value.strip().encode(errors="surrogateescape"), token.encode()):
        return HTTPStatus.UNAUTHORIZED, f'{CHALLENGE}, error="invalid_token"', sentence
    return None
