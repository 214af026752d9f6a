"""Bearer tokens: what one looks like, what is stored of it, and the file that lists those that are good.

A token is `eq_ID_SECRET`: the id, 12 hexadecimal digits, finds its entry; the secret is 256 random bits, of which the
file holds the SHA-256. A slow hash would protect nothing more: such a secret cannot be guessed.
"""

import hashlib
import hmac
import re
import secrets
import tomllib
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from equipoise_server.security.tenants import Tenant, check_apart

TOKEN = re.compile(r"eq_([0-9a-f]{12})_[A-Za-z0-9_-]{43}")
_NOBODY = "0" * 64


class Scope(StrEnum):
    """What a token allows; no scope includes another."""

    READ = "read"
    """Look at policies, weights and scores; export, sample, watch, and fork from."""
    TRAIN = "train"
    """Create policies and send steps."""
    ADMIN = "admin"
    """Delete and import policies."""


class TokenFileError(ValueError):
    """A tokens file that cannot be used; the message names file, entry and rule, and quotes no secret."""


class Token(BaseModel):
    """What is kept of a token.

    Attributes:
        id: the public part.
        sha256: of the whole token, hexadecimal.
        tenant: name of the tenant it belongs to.
        scopes: what it allows.
        expires: when it ends; None: never.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[0-9a-f]{12}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    tenant: str
    scopes: frozenset[Scope] = Field(min_length=1)
    expires: datetime | None = None

    def expired(self, now: float) -> bool:
        """Whether it has ended by `now`, seconds since the epoch; a time without a zone is UTC."""
        if self.expires is None:
            return False
        moment = self.expires if self.expires.tzinfo else self.expires.replace(tzinfo=UTC)
        return moment.timestamp() <= now


class TokenFile(BaseModel):
    """All tenants and tokens: `[tenants.NAME]` tables and `[[tokens]]`, in TOML."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tenants: Mapping[str, Tenant] = {}
    tokens: tuple[Token, ...] = ()

    @classmethod
    def read(cls, path: Path) -> "TokenFile":
        """Reads the file. Raises TokenFileError."""
        try:
            return cls.parse(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise TokenFileError(f"{path}: {error.strerror}") from error
        except ValidationError as error:
            raise TokenFileError(f"{path}: {'; '.join(_sentences(error))}") from None  # its text quotes the input
        except ValueError as error:
            raise TokenFileError(f"{path}: {error}") from error

    @classmethod
    def parse(cls, text: str) -> "TokenFile":
        """The file from its text. Raises ValueError."""
        fields = tomllib.loads(text)
        tenants = fields.get("tenants")
        if isinstance(tenants, dict):
            fields["tenants"] = {
                name: {**table, "name": name} if isinstance(table, dict) else table for name, table in tenants.items()
            }
        file = cls.model_validate(fields)
        check_apart(file.tenants.values())
        for token in file.tokens:
            if token.tenant not in file.tenants:
                raise ValueError(f"token {token.id}: tenant {token.tenant!r} has no table [tenants.{token.tenant}]")
        if len({token.id for token in file.tokens}) < len(file.tokens):
            raise ValueError("two tokens have the same id")
        return file


def new_token(*, tenant: str, scopes: Iterable[Scope], expires: datetime | None = None) -> tuple[str, Token]:
    """A fresh token, and what is kept of it."""
    public = secrets.token_hex(6)
    text = f"eq_{public}_{secrets.token_urlsafe(32)}"
    kept = Token(id=public, sha256=digest(text), tenant=tenant, scopes=frozenset(scopes), expires=expires)
    return text, kept


def digest(text: str) -> str:
    """SHA-256 of a whole token, hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def find(tokens: Mapping[str, Token], presented: str) -> Token | None:
    """The entry of the token that is presented, by its id; None where there is none or the secret is another.

    Takes as long for an unknown id as for a wrong secret.
    """
    match = TOKEN.fullmatch(presented)
    known = tokens.get(match[1]) if match else None
    equal = hmac.compare_digest(known.sha256 if known else _NOBODY, digest(presented))
    return known if equal else None


def entry(token: Token) -> str:
    """The token's lines in the file."""
    fields: dict[str, Any] = {
        "tenant": _quoted(token.tenant),
        "id": _quoted(token.id),
        "sha256": _quoted(token.sha256),
        "scopes": f"[{', '.join(_quoted(scope) for scope in sorted(token.scopes))}]",
    }
    if token.expires is not None:
        fields["expires"] = token.expires.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return "\n".join(["[[tokens]]", *(f"{name} = {value}" for name, value in fields.items())]) + "\n"


def _quoted(text: str) -> str:
    return f'"{text}"'


def _sentences(error: ValidationError) -> Iterable[str]:
    for problem in error.errors(include_url=False, include_input=False):
        yield f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].removeprefix('Input ')}"
