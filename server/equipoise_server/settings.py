"""Settings of the server, from flags, the environment and a file, in this order; every one is described here once."""

import argparse
import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from pydantic_settings import SettingsError as SourceError

from equipoise.security import VARIABLES as CLIENT_VARIABLES
from equipoise_server.addresses import check_reachable, host_and_port, is_loopback
from equipoise_server.redis_url import RedisAccess, RedisUrl

PROGRAM = "equipoise serve"
ENV_PREFIX = "EQUIPOISE_"
KIB = 1024
MIB = 1024 * KIB
HOUR_S = 3600.0

SERVICE_LINK = re.compile(
    rf"{ENV_PREFIX}(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)
"""What Kubernetes sets in every pod beside a Service whose name begins with `equipoise`."""


class SettingsError(ValueError):
    """A setting that cannot be used; the message names the setting, its value and the rule."""


def _check_address(address: str) -> str:
    host_and_port(address)
    return address


def _check_address_or_empty(address: str) -> str:
    return address and _check_address(address)


def _check_advertised(address: str) -> str:
    if address:
        check_reachable(address)
    return address


def _check_redis_url(url: SecretStr) -> SecretStr:
    RedisUrl.parse(url.get_secret_value())
    return url


def _check_path(path: object) -> object:
    if path == "":
        raise ValueError("is empty: name a file, or leave the setting out")
    return path


def _state_dir() -> Path:
    """Where this user's programs keep their state (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(base if os.path.isabs(base) else "/var/lib") / "equipoise"  # an account without home is a service's


Address = Annotated[str, AfterValidator(_check_address)]
OptionalAddress = Annotated[str, AfterValidator(_check_address_or_empty)]
AdvertisedAddress = Annotated[str, AfterValidator(_check_advertised)]
SecretUrl = Annotated[SecretStr, AfterValidator(_check_redis_url)]
OptionalPath = Annotated[Path | None, BeforeValidator(_check_path)]


class Settings(BaseSettings):
    """The policy server: streams of gradient statistics in, example weights out."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        frozen=True,
        extra="forbid",
        cli_prog_name=PROGRAM,
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    config: OptionalPath = Field(None, description="TOML file with settings, one `name = value` a line")

    listen: Address = Field("127.0.0.1:50051", description="gRPC address HOST:PORT; no host: every interface")
    metrics_listen: OptionalAddress = Field(
        "127.0.0.1:9464", description="address of /metrics, /livez, /readyz and /healthz, without TLS; empty: none"
    )
    processes: int = Field(
        1,
        ge=1,
        le=64,
        description="processes that share the policies, for more than one core: all listen at listen, and each at a"
        " port of its own behind it, where others send trainers: 50052 to 50055 for four at 50051, of advertise too."
        " max_inflight_bytes, max_import_bytes, max_backlogs_bytes and metrics_max_policies are divided among them;"
        " every other bound holds for each",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where policies live; auto: the GPU if any")
    ready_file: OptionalPath = Field(
        None, description="file that appears once the server serves: JSON with address, metrics_address and pid"
    )

    tls_certificate: OptionalPath = Field(
        None, description="PEM file with the server's certificate and those behind it; read again when it changes"
    )
    tls_key: OptionalPath = Field(None, description="PEM file with the private key of tls_certificate")
    tls_client_ca: OptionalPath = Field(
        None,
        description="PEM file with the authorities of which every client needs a certificate; none: clients need none",
    )
    tokens_file: OptionalPath = Field(
        None,
        description="TOML file with the tenants and tokens that may call, see `equipoise token --help`; read again when"
        " it changes; none: everybody may do everything",
    )
    allow_insecure: bool = Field(
        False,
        description="listen beyond this machine although there is no TLS, or neither tokens nor client certificates",
    )

    redis_url: SecretUrl | None = Field(
        None,
        description="Redis that keeps the policies: redis://, unix://, redis+sentinel://h:p,h:p/master/db or"
        " redis+cluster://h:p,h:p, with TLS rediss://, rediss+sentinel:// and rediss+cluster://; none: the server runs"
        " a Redis of its own in data_dir",
    )
    redis_url_file: OptionalPath = Field(None, description="file that holds redis_url, to keep its password secret")
    redis_username: str = Field("", description="user of Redis, if redis_url names none")
    redis_password_file: OptionalPath = Field(
        None, description="file that holds the password of Redis, as it is, if redis_url holds none"
    )
    redis_sentinel_username: str = Field("", description="user of the Sentinels, who have users of their own")
    redis_sentinel_password_file: OptionalPath = Field(
        None, description="file that holds the password of the Sentinels, as it is"
    )
    redis_tls_ca: OptionalPath = Field(
        None, description="PEM file with the authorities that certify Redis; none: those of the system"
    )
    redis_tls_certificate: OptionalPath = Field(
        None, description="PEM file with the certificate to show Redis, which may ask for one"
    )
    redis_tls_key: OptionalPath = Field(None, description="PEM file with the private key of redis_tls_certificate")
    redis_tls_check_hostname: bool = Field(
        True, description="whether the certificate of Redis must name the host that was asked for"
    )
    redis_timeout_s: float = Field(1.0, gt=0, description="longest wait for one answer of Redis")
    redis_wait_replicas: int = Field(
        0,
        ge=0,
        description="replicas of Redis that must have a step before it counts as durable; 0: a failover of Redis itself"
        " may lose steps that did",
    )
    data_dir: Path = Field(_state_dir(), description="folder of the server's own Redis")
    fsync: Literal["everysec", "always"] = Field(
        "everysec", description="when the server's own Redis is flushed to disk; always: survives power loss, slower"
    )

    advertise: AdvertisedAddress = Field(
        "",
        description="address HOST:PORT under which trainers reach this server: another one tells it to those who ask"
        " there for a policy of this one; empty: listen, or where that is every interface this machine's name, in a pod"
        " the pod's address (POD_IP if it is set); with TLS it must be a name in the certificate",
    )
    spread_policies: bool = Field(
        True,
        description="servers that share a Redis share its policies evenly and hand some over when servers join;"
        " off: a policy stays with the server that was asked first, as a proxy that routes by policy wants it",
    )
    owner_timeout_s: float = Field(
        5.0, gt=0, description="policies of a server that Redis has not heard of for so long may move to another one"
    )

    log_timeout_s: float = Field(
        0.25, gt=0, description="longest wait for a step to reach Redis before it is answered as not yet durable"
    )
    sweep_min_bytes: int = Field(
        64 * MIB,
        ge=MIB,
        description="a policy's log grows at least this far before a sweep; rule trajectory: a quarter of its rows",
    )
    sweep_bytes_per_s: int = Field(64 * MIB, ge=MIB, description="how fast a sweep writes pages to Redis, per policy")
    max_backlog_bytes: int = Field(
        256 * MIB,
        ge=MIB,
        description="memory for the log entries of one policy that Redis lacks, or might lose: when it is full, steps"
        " wait while Redis is slow; while Redis fails they go on, and the tables are written anew afterwards",
    )
    max_backlogs_bytes: int = Field(
        1024 * MIB, ge=MIB, description="the same for all policies together: when it is full, each has an equal part"
    )
    policy_idle_s: float = Field(600.0, gt=0, description="a policy that nobody uses for so long leaves memory")
    trainer_idle_s: float = Field(24 * HOUR_S, gt=0, description="a trainer silent for so long is forgotten")

    max_trainers: int = Field(10_000, ge=1, description="most trainers of one policy, until idle ones are forgotten")
    max_batch_examples: int = Field(262_144, ge=1, description="most rows of one request")
    max_examples: int = Field(4_000_000_000, ge=1, le=2**63 - 1, description="most examples of one policy")
    max_message_bytes: int = Field(16 * MIB, ge=64 * KIB, le=2**31 - 1, description="largest gRPC message")
    max_queued_steps: int = Field(256, ge=1, description="most steps waiting for one policy; beyond, its streams wait")
    max_queued_bytes: int = Field(256 * MIB, ge=MIB, description="most bytes of steps waiting for one policy")
    max_tenant_inflight_bytes: int = Field(
        128 * MIB,
        ge=MIB,
        description="most bytes of steps that a tenant (without tokens: a policy) has under way; beyond, they wait",
    )
    max_inflight_bytes: int = Field(512 * MIB, ge=MIB, description="most bytes of steps under way in all")
    max_streams: int = Field(4096, ge=1, description="most open training streams")
    max_concurrent_rpcs: int = Field(
        8192, ge=1, description="most RPCs at once, streams included; health checks have room of their own"
    )
    max_tenant_rpcs: int = Field(
        2048, ge=1, description="most RPCs of one tenant at once, unless its table has max_calls"
    )
    first_message_timeout_s: float = Field(
        10.0,
        gt=0,
        description="an RPC that has not sent its first message by then is ended; an import, that pauses so long",
    )
    write_timeout_s: float = Field(60.0, gt=0, description="an RPC whose answer nobody reads for so long is ended")
    max_import_bytes: int = Field(1024 * MIB, ge=MIB, description="memory for policies that are being imported")
    min_ping_interval_s: float = Field(5.0, gt=0, description="clients that ping more often are disconnected")
    keepalive_s: float = Field(30.0, gt=0, description="a silent connection is pinged after so long")
    keepalive_timeout_s: float = Field(5.0, gt=0, description="a pinged connection that stays silent is closed")

    drain_delay_s: float = Field(
        0.0, ge=0, description="how long to go on serving after SIGTERM, not ready any more, until balancers notice"
    )
    drain_grace_s: float = Field(20.0, ge=0, description="longest wait for open requests while stopping")

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="json: one object a line; console: for eyes; auto: console on a terminal, else json"
    )
    metrics_max_policies: int = Field(
        34, ge=0, description="most policies with metrics of their own, 25 series each, shared among tenants"
    )

    @model_validator(mode="after")
    def _one_redis_url(self) -> "Settings":
        if self.redis_url is not None and self.redis_url_file is not None:
            raise ValueError("redis_url and redis_url_file are both set: keep one")
        return self

    @model_validator(mode="after")
    def _ports_of_processes(self) -> "Settings":
        for name in ("listen", "advertise"):
            last = host_and_port(getattr(self, name) or ":0")[1] + self.processes
            if self.processes > 1 and last > 65_535:
                raise ValueError(f"{name}: processes = {self.processes} need the ports up to {last}, beyond 65535")
        return self

    @model_validator(mode="after")
    def _tls_files_go_together(self) -> "Settings":
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key: one is set, TLS needs both")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError(
                "tls_client_ca is set without tls_certificate and tls_key: only TLS has client certificates"
            )
        return self

    @model_validator(mode="after")
    def _open_to_this_machine_alone(self) -> "Settings":
        if self.allow_insecure or is_loopback(self.listen):
            return self
        asks = self.tokens_file is not None or self.tls_client_ca is not None
        lacking = [
            *([] if self.tls_certificate else ["TLS (tls_certificate, tls_key)"]),
            *([] if asks else ["authentication (tokens_file or tls_client_ca)"]),
        ]
        if lacking:
            raise ValueError(
                f"listen: {self.listen!r} is reached from other machines, which needs {' and '.join(lacking)};"
                " allow_insecure = true listens without, for networks where everybody may do everything"
            )
        return self

    @property
    def redis(self) -> RedisUrl | None:
        """The URL of Redis, from the file if it was given by file; None: run our own.

        Raises SettingsError for a file that cannot be read or holds no such URL.
        """
        if self.redis_url_file is None:
            return RedisUrl.parse(self.redis_url.get_secret_value()) if self.redis_url is not None else None
        try:
            return RedisUrl.parse(_secret("redis_url_file", self.redis_url_file))
        except ValueError as error:
            raise SettingsError(f"redis_url_file: the URL in {self.redis_url_file} {error}") from None

    @property
    def redis_access(self) -> RedisAccess:
        """How to enter Redis beyond what its URL says.

        Raises SettingsError for a file that cannot be read, and for credentials given twice or without a use.
        """
        url = self.redis
        if url is None or not url.tls:
            for name in ("redis_tls_ca", "redis_tls_certificate", "redis_tls_key"):
                if getattr(self, name) is not None:
                    raise SettingsError(f"{name}: is set, but redis_url is without TLS: use its scheme with rediss")
        for name, there in (
            ("redis_username", url and url.username),
            ("redis_password_file", url and url.password),
        ):
            if getattr(self, name) and (there or url is None):
                why = "redis_url holds one, too: keep one" if there else "there is no redis_url"
                raise SettingsError(f"{name}: is set, but {why}")
        if self.redis_wait_replicas and url is None:
            raise SettingsError("redis_wait_replicas: is set, but there is no redis_url: a Redis of its own has none")
        for name in ("redis_sentinel_username", "redis_sentinel_password_file"):
            if getattr(self, name) and (url is None or url.topology != "sentinel"):
                raise SettingsError(f"{name}: is set, but redis_url names no Sentinels")
        return RedisAccess(
            username=self.redis_username,
            password=_secret("redis_password_file", self.redis_password_file),
            sentinel_username=self.redis_sentinel_username,
            sentinel_password=_secret("redis_sentinel_password_file", self.redis_sentinel_password_file),
            tls_ca=_readable("redis_tls_ca", self.redis_tls_ca),
            tls_certificate=_readable("redis_tls_certificate", self.redis_tls_certificate),
            tls_key=_readable("redis_tls_key", self.redis_tls_key),
            tls_check_hostname=self.redis_tls_check_hostname,
        )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Explicit arguments (flags among them), then the environment, then the file."""
        return init_settings, env_settings, _FileSource(settings_cls)


class _FileSource(PydanticBaseSettingsSource):
    """Reads the TOML file that `config` names; settings of earlier sources are known by then."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        raise AssertionError("values come from the whole file")

    def __call__(self) -> dict[str, Any]:
        path = self.current_state.get("config")
        if path is None:
            return {}
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise SettingsError(f"config: {path}: {error.strerror}") from error
        except ValueError as error:
            raise SettingsError(f"config: {path} is not TOML: {error}") from error
        for name in values:
            if name not in _names() or name == "config":
                raise SettingsError(f"{path}: {_unknown(name, _names())}")
        return values


def _secret(name: str, path: Path | None) -> str:
    """What a file holds, without the line end that editors add; empty for no file."""
    if path is None:
        return ""
    try:
        return path.read_text(encoding="utf-8").rstrip("\r\n")
    except OSError as error:
        raise SettingsError(f"{name}: {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise SettingsError(f"{name}: {path} is not UTF-8 text") from None


def _readable(name: str, path: Path | None) -> Path | None:
    if path is not None:
        try:
            path.open("rb").close()
        except OSError as error:
            raise SettingsError(f"{name}: {path}: {error.strerror}") from error
    return path


def load(arguments: Sequence[str], *, program: str = PROGRAM) -> Settings:
    """The settings that flags, `EQUIPOISE_*` variables and the file make up; `program` is whose flags they are.

    Prints help and raises SystemExit for `--help` and for flags it does not know.
    Raises SettingsError, whose message names setting, value and rule.
    """
    known = {ENV_PREFIX + name.upper() for name in _names()}
    for variable in os.environ:
        if not variable.startswith(ENV_PREFIX) or SERVICE_LINK.fullmatch(variable):
            continue
        if variable not in known and variable not in CLIENT_VARIABLES:
            raise SettingsError(f"environment: {_unknown(variable, known)}")
    parser = argparse.ArgumentParser(
        prog=program,
        usage=f"{program} [--SETTING VALUE]...",
        description=Settings.__doc__,
        epilog=f"Each setting is also a variable, such as {ENV_PREFIX}LISTEN, and a name in the file, such as listen.",
        allow_abbrev=False,
    )
    flags = CliSettingsSource[argparse.ArgumentParser](Settings, root_parser=parser, cli_parse_args=list(arguments))
    try:
        given = flags()
        _check_no_password(given.get("redis_url"))
        return Settings(**given)
    except ValidationError as error:
        raise SettingsError("; ".join(_sentences(error))) from error
    except SourceError as error:
        raise SettingsError(str(error)) from error


def _check_no_password(redis_url: object) -> None:
    """Flags are seen by everybody on the machine who lists its processes."""
    if redis_url is None:
        return
    try:
        holds = bool(RedisUrl.parse(str(redis_url)).password)
    except ValueError as error:
        raise SettingsError(f"redis_url: {error}") from None
    if holds:
        raise SettingsError(
            "redis_url: a password in a flag is seen by whoever lists the processes; use redis_password_file"
        )


def _names() -> Iterable[str]:
    return Settings.model_fields.keys()


def _unknown(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"{name} is no setting" + (f"; did you mean {near[0]}?" if near else "")


def _sentences(error: ValidationError) -> Iterable[str]:
    for problem in error.errors(include_url=False):
        rule = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
        if not problem["loc"]:
            yield rule
            continue
        name = str(problem["loc"][0])
        shown = "" if name == "redis_url" else f" {problem['input']!r}"
        yield f"{name}:{shown} {rule}"
