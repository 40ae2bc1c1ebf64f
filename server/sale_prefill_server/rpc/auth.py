"""Who calls. The tenant comes from the credential and from nothing else."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sale_prefill_server.config import ConfigError
from sale_prefill_server.errors import PrefillError, Reason


@dataclass(frozen=True)
class Caller:
    """An authenticated caller; sessions belong to its tenant."""

    tenant: str


class Authenticator(Protocol):
    """Turns call metadata into a caller. Implementations are quick and thread-safe."""

    def authenticate(self, metadata: Mapping[str, str]) -> Caller:
        """The caller.

        Raises:
            PrefillError: UNAUTHENTICATED.
        """
        ...


class Anonymous:
    """Everybody is one tenant; for servers that only trusted callers reach."""

    def authenticate(self, metadata: Mapping[str, str]) -> Caller:
        """The one caller there is."""
        return Caller("anonymous")


class StaticTokens:
    """Bearer tokens from a file of `tenant:token` lines; `#` starts a comment.

    Raises:
        ConfigError: unreadable, malformed or empty file.
    """

    def __init__(self, file: Path) -> None:
        try:
            lines = file.read_text().splitlines()
        except OSError as error:
            raise ConfigError(
                f"auth_tokens_file {file}: {error.strerror}; check the path and its permissions"
            ) from error
        self._tenants: dict[bytes, str] = {}
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            tenant, separator, token = line.strip().partition(":")
            if not (tenant and separator and token):
                raise ConfigError(f"auth_tokens_file {file}, line {number}: expected 'tenant:token'")
            self._tenants[_digest(token)] = tenant
        if not self._tenants:
            raise ConfigError(
                f"auth_tokens_file {file} names no tenant: add 'tenant:token' lines, or leave the file out"
            )

    def authenticate(self, metadata: Mapping[str, str]) -> Caller:
        """The tenant of the bearer token (RFC 6750 section 2.1)."""
        scheme, _, token = metadata.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and token:
            digest = _digest(token.strip())
            for known, tenant in self._tenants.items():
                if hmac.compare_digest(known, digest):
                    return Caller(tenant)
        raise PrefillError(
            Reason.UNAUTHENTICATED,
            "no valid credential: send the metadata 'authorization: Bearer TOKEN' with a token that this server knows",
        )


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
