"""A client's TLS and token: from where they come, where they go, and where they must not."""

import os
from copy import deepcopy
from pathlib import Path

import pytest

from equipoise import PolicyAdmin, PolicyClient, Security, aio
from equipoise.channel import Server
from equipoise.errors import AccessDeniedError, InvalidRequestError
from equipoise.security import VARIABLES

SECRET = "eq_0123456789ab_secret"


def test_the_environment_says_it_all() -> None:
    given = {
        "EQUIPOISE_TLS": "true",
        "EQUIPOISE_ROOT_CERTIFICATES": "ca.pem",
        "EQUIPOISE_CLIENT_CERTIFICATE": "me.pem",
        "EQUIPOISE_CLIENT_KEY": "me.key",
        "EQUIPOISE_TOKEN_FILE": "token",
        "EQUIPOISE_LISTEN": "not the client's",
    }
    assert Security.from_environment(given) == Security(
        tls=True, root_certificates="ca.pem", client_certificate="me.pem", client_key="me.key", token_file="token"
    )
    assert Security.from_environment({}) == Security()
    assert Security.from_environment({"EQUIPOISE_TOKEN": SECRET}).headers() == (("authorization", f"Bearer {SECRET}"),)


def test_the_environment_is_the_one_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` puts a copy of `os.environ` in its place whenever `map` starts processes."""
    monkeypatch.setattr(os, "environ", deepcopy(os.environ))
    monkeypatch.setenv("EQUIPOISE_TOKEN", SECRET)
    assert Security.from_environment().token == SECRET


def test_every_client_takes_the_environment_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQUIPOISE_TOKEN", SECRET)
    for make in (PolicyAdmin, aio.PolicyAdmin, lambda address: PolicyClient(address, policy="p"),
                 lambda address: aio.PolicyClient(address, policy="p")):  # fmt: skip
        with pytest.raises(InvalidRequestError, match="unencrypted"):
            make("trainer.example:50051")
    assert Server.at("localhost:1", None).headers("p") == (
        ("authorization", f"Bearer {SECRET}"),
        ("x-equipoise-policy", "p"),
    )
    assert Server.at("localhost:1", Security()).headers() == ()


@pytest.mark.parametrize(
    ("address", "safe"),
    [
        ("localhost:50051", True),
        ("127.8.0.1:50051", True),
        ("[::1]:50051", True),
        ("dns:///localhost:50051", True),
        ("unix:/run/equipoise.sock", True),
        ("10.0.0.1:50051", False),
        ("localhost.example:50051", False),
        ("dns:///equipoise.example:50051", False),
        ("", False),
    ],
)
def test_a_token_travels_encrypted_or_stays_on_this_machine(address: str, safe: bool) -> None:
    for plain in (Security(token=SECRET), Security(token_file="token")):
        if safe:
            plain.check_address(address)
        else:
            with pytest.raises(InvalidRequestError, match="token: would reach"):
                plain.check_address(address)
    Security(token=SECRET, tls=True).check_address(address)
    Security(token=SECRET, allow_plaintext_token=True).check_address(address)
    Security().check_address(address)


def test_a_token_is_not_shown() -> None:
    security = Security(token=SECRET)
    assert SECRET not in repr(security)
    assert SECRET not in repr(Server("localhost:1", security))
    with pytest.raises(InvalidRequestError) as caught:
        Security(token=f"{SECRET}\n")
    assert SECRET not in str(caught.value)


def test_a_tokens_file_is_read_for_each_call(tmp_path: Path) -> None:
    file = tmp_path / "token"
    security = Security(token_file=file)
    with pytest.raises(AccessDeniedError, match=r"token_file: .*token: No such file"):
        security.headers()
    for token in ("one", "two"):
        file.write_text(f"{token}\n")
        assert security.headers() == (("authorization", f"Bearer {token}"),)
    file.write_text("\n")
    with pytest.raises(AccessDeniedError, match="holds no token"):
        security.headers()


@pytest.mark.parametrize(
    "fields",
    [
        {"client_certificate": "me.pem"},
        {"client_key": "me.key"},
        {"token": "a", "token_file": "b"},
        {"token": ""},
        {"token": "ü"},
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, str]) -> None:
    with pytest.raises(InvalidRequestError):
        Security(**fields)  # type: ignore[arg-type]


def test_tls_is_implied_by_certificates() -> None:
    assert Security(root_certificates="ca.pem").tls
    assert Security(client_certificate="me.pem", client_key="me.key").tls
    assert not Security(token="x").tls
    assert Security().credentials() is None


def test_a_flag_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="EQUIPOISE_TLS = maybe"):
        Security.from_environment({"EQUIPOISE_TLS": "maybe"})
    assert set(VARIABLES.values()) <= set(Security.__slots__)
