"""Tokens and tenants without a server: what a file may say, and who is let in."""

import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise_server.errors import Code, ServiceError
from equipoise_server.security import Access, Caller, Scope, Tenant, Token, TokenFile, TokenFileError, entry, new_token
from equipoise_server.security.caller import ANY_SCOPE

TENANTS = '[tenants.red]\nprefix = "red-"\n[tenants.blue]\nprefix = "blue-"\nmax_policies = 3\n'
GET = "/equipoise.v1.PolicyService/GetPolicy"


def bearer(token: str) -> tuple[tuple[str, str | bytes], ...]:
    return (("user-agent", "test"), ("authorization", f"Bearer {token}"))


def reason(access: Access, metadata: tuple[tuple[str, str | bytes], ...], method: str = GET) -> tuple[Code, str]:
    with pytest.raises(ServiceError) as caught:
        access.admit(method, metadata)
    return caught.value.code, caught.value.reason


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tokens.toml"


def test_the_file_holds_a_hash_and_not_the_token() -> None:
    token, kept = new_token(tenant="red", scopes=[Scope.READ])
    lines = entry(kept)
    assert token not in lines
    assert token.rpartition("_")[2] not in lines
    assert hashlib.sha256(token.encode()).hexdigest() in lines
    assert TokenFile.parse(TENANTS + lines).tokens == (kept,)


def test_no_two_tokens_are_alike() -> None:
    made = [new_token(tenant="red", scopes=[Scope.READ])[0] for _ in range(100)]
    assert len({token.split("_", 2)[2] for token in made}) == 100


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[tenants.a]\nprefix = "x"\n[tenants.b]\nprefix = "xy"\n', "tenants.b.prefix: 'xy' begins with 'x'"),
        ('[tenants.a]\nprefix = "x"\n[tenants.b]\nprefix = "x"\n', "begins with 'x'"),
        ('[tenants.a]\nprefix = "X"\n', "tenants.a.prefix"),
        ("[tenants.a]\n", "tenants.a.prefix: Field required"),
        ('[tenants.a]\nprefix = "a-"\nmax_polices = 1\n', "tenants.a.max_polices: Extra inputs"),
        ('[tenants.a]\nprefix = "a-"\nmax_streams = 0\n', "tenants.a.max_streams"),
        ('[[tokens]]\ntenant = "x"\nid = "000000000000"\nsha256 = "' + "0" * 64 + '"\nscopes = ["read"]\n',
         "tenant 'x' has no table"),
        ("tokens = 1\n", "tokens"),
        ("tenants = 1\n", "tenants"),
        ("[tenants", "at the end of a table declaration"),
    ],
)  # fmt: skip
def test_a_file_that_says_something_else_is_refused(file: Path, text: str, said: str) -> None:
    file.write_text(text)
    with pytest.raises(TokenFileError) as caught:
        TokenFile.read(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert said in str(caught.value)


def test_an_operator_sees_everybody_and_is_no_overlap() -> None:
    tenants = TokenFile.parse(TENANTS + '[tenants.all]\nprefix = ""\n').tenants
    assert tenants["all"].owns("red-1")
    assert not tenants["red"].owns("blue-1")


def test_two_tokens_with_one_id_are_refused(file: Path) -> None:
    lines = entry(new_token(tenant="red", scopes=[Scope.READ])[1])
    file.write_text(TENANTS + lines + lines)
    with pytest.raises(TokenFileError, match="same id"):
        TokenFile.read(file)


def test_a_token_is_good_until_it_expires(file: Path) -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    token, kept = new_token(tenant="red", scopes=[Scope.READ], expires=start + timedelta(hours=1))
    file.write_text(TENANTS + entry(kept))
    now = [start.timestamp()]
    access = Access(file, wall_clock=lambda: now[0])
    access.load()
    assert access.admit(GET, bearer(token)).tenant.name == "red"
    now[0] += 3600
    assert reason(access, bearer(token)) == (Code.UNAUTHENTICATED, "TOKEN_EXPIRED")
    forged = token[:-1] + ("a" if token[-1] != "a" else "b")
    assert reason(access, bearer(forged)) == (Code.UNAUTHENTICATED, "TOKEN_INVALID")  # does not tell that it expired


def test_headers_that_are_no_single_bearer_are_refused(file: Path) -> None:
    token, kept = new_token(tenant="red", scopes=[Scope.READ])
    file.write_text(TENANTS + entry(kept))
    access = Access(file)
    access.load()
    assert access.admit(GET, (("authorization", f"bearer {token} "),)).token == kept
    for metadata in (
        (("authorization", token),),
        (("authorization", f"Basic {token}"),),
        (("authorization", f"Bearer {token}"), ("authorization", f"Bearer {token}")),
        (("authorization", b"Bearer \xff\xfe"),),
        (("authorization", ""),),
    ):
        assert reason(access, metadata) == (Code.UNAUTHENTICATED, "TOKEN_INVALID")
    assert reason(access, ()) == (Code.UNAUTHENTICATED, "TOKEN_MISSING")


def test_a_method_that_the_table_does_not_know_needs_admin(file: Path) -> None:
    token, kept = new_token(tenant="red", scopes=[Scope.READ, Scope.TRAIN])
    file.write_text(TENANTS + entry(kept))
    access = Access(file)
    access.load()
    assert reason(access, bearer(token), "/equipoise.v1.PolicyService/New") == (
        Code.PERMISSION_DENIED,
        "SCOPE_MISSING",
    )


@given(st.text(alphabet="abc-.", min_size=0, max_size=4), st.text(alphabet="abc-.", min_size=0, max_size=4))
def test_a_listing_never_leaves_the_tenants_prefix(prefix: str, asked: str) -> None:
    tenant = Tenant.model_construct(name="t", prefix=prefix)
    visible = Caller(tenant, ANY_SCOPE).visible_prefix(asked)
    names = {"a", "ab", "abc", "b", "b-", "c.a", prefix + "x", asked + "x", prefix, asked}
    listed = {name for name in names if visible is not None and name.startswith(visible)}
    assert listed == {name for name in names if name.startswith(prefix) and name.startswith(asked)}


def test_a_policy_belongs_to_the_tenant_whose_prefix_it_has(file: Path) -> None:
    file.write_text(TENANTS + '[tenants.all]\nprefix = ""\n')
    access = Access(file)
    assert access.tenant_of("red-1") == ""  # nothing was read yet
    access.load()
    assert [access.tenant_of(name) for name in ("red-1", "blue-1", "none")] == ["red", "blue", ""]


def test_without_a_file_everybody_may_do_everything() -> None:
    access = Access(None)
    access.load()
    assert access.admit(GET, ()).scopes == ANY_SCOPE


def test_a_kept_token_compares_by_all_it_allows() -> None:
    _, kept = new_token(tenant="red", scopes=[Scope.READ])
    assert kept != Token(**kept.model_dump() | {"scopes": frozenset(Scope)})
