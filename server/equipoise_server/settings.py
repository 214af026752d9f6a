"""Settings of the server, from flags, the environment and a file, in this order; every one is described here once."""

import argparse
import difflib
import ipaddress
import os
import re
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from pydantic_settings import SettingsError as SourceError

from equipoise.security import VARIABLES as CLIENT_VARIABLES

PROGRAM = "equipoise serve"
ENV_PREFIX = "EQUIPOISE_"
KIB = 1024
MIB = 1024 * KIB
HOUR_S = 3600.0

ADDRESS = re.compile(r"(?P<host>\[[0-9a-fA-F:.%]+\]|[^\s:/\[\]]*):(?P<port>\d{1,5})")
REDIS_SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "redis+cluster")


class SettingsError(ValueError):
    """A setting that cannot be used; the message names the setting, its value and the rule."""


def host_and_port(address: str) -> tuple[str, int]:
    """Splits `HOST:PORT`; an empty host is every interface, IPv6 hosts stand in brackets and come back without.

    Raises ValueError for anything else.
    """
    match = ADDRESS.fullmatch(address)
    if match is None or int(match["port"]) > 65_535:
        raise ValueError("is not HOST:PORT, such as 127.0.0.1:50051, [::1]:50051 or :0 for a free port")
    return match["host"].strip("[]"), int(match["port"])


def is_loopback(address: str) -> bool:
    """Whether `HOST:PORT` is reached from this machine alone."""
    host, _ = host_and_port(address)
    try:
        return host == "localhost" or ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:  # any other name may be anywhere, and no name is everywhere
        return False


def _check_address(address: str) -> str:
    host_and_port(address)
    return address


def _check_address_or_empty(address: str) -> str:
    return address and _check_address(address)


def _check_redis_url(url: SecretStr) -> SecretStr:
    scheme, separator, _ = url.get_secret_value().partition("://")
    if not separator or scheme not in REDIS_SCHEMES:
        raise ValueError(f"does not start with one of {', '.join(f'{known}://' for known in REDIS_SCHEMES)}")
    return url


def _state_dir() -> Path:
    """Where this user's programs keep their state (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(base if os.path.isabs(base) else "/var/lib") / "equipoise"  # an account without home is a service's


Address = Annotated[str, AfterValidator(_check_address)]
OptionalAddress = Annotated[str, AfterValidator(_check_address_or_empty)]
RedisUrl = Annotated[SecretStr, AfterValidator(_check_redis_url)]


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

    config: Path | None = Field(None, description="TOML file with settings, one `name = value` a line")

    listen: Address = Field("127.0.0.1:50051", description="gRPC address HOST:PORT; no host: every interface")
    metrics_listen: OptionalAddress = Field(
        "127.0.0.1:9464", description="address of /metrics and /healthz; empty: none"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where policies live; auto: the GPU if any")
    ready_file: Path | None = Field(
        None, description="file that appears once the server serves: JSON with address, metrics_address and pid"
    )

    tls_certificate: Path | None = Field(
        None, description="PEM file with the server's certificate and those behind it; read again when it changes"
    )
    tls_key: Path | None = Field(None, description="PEM file with the private key of tls_certificate")
    tls_client_ca: Path | None = Field(
        None,
        description="PEM file with the authorities of which every client needs a certificate; none: clients need none",
    )
    tokens_file: Path | None = Field(
        None,
        description="TOML file with the tenants and tokens that may call, see `equipoise token --help`; read again when"
        " it changes; none: everybody may do everything",
    )
    allow_insecure: bool = Field(
        False,
        description="listen beyond this machine although there is no TLS, or neither tokens nor client certificates",
    )

    redis_url: RedisUrl | None = Field(
        None,
        description="Redis that keeps the policies: redis://, rediss://, unix://, redis+sentinel://h:p,h:p/master/db"
        " or redis+cluster://; none: the server runs a Redis of its own in data_dir",
    )
    redis_url_file: Path | None = Field(None, description="file that holds redis_url, to keep its password secret")
    redis_timeout_s: float = Field(1.0, gt=0, description="longest wait for one answer of Redis")
    data_dir: Path = Field(_state_dir(), description="folder of the server's own Redis")
    fsync: Literal["everysec", "always"] = Field(
        "everysec", description="when the server's own Redis is flushed to disk; always: survives power loss, slower"
    )

    advertise: OptionalAddress = Field(
        "",
        description="address HOST:PORT under which trainers reach this server: another one tells it to those who ask"
        " there for a policy of this one; empty: listen, with this machine's name where that is every interface",
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
    policy_idle_s: float = Field(600.0, gt=0, description="a policy that nobody uses for so long leaves memory")
    trainer_idle_s: float = Field(24 * HOUR_S, gt=0, description="a trainer silent for so long is forgotten")

    max_batch_examples: int = Field(262_144, ge=1, description="most rows of one request")
    max_examples: int = Field(4_000_000_000, ge=1, le=2**63 - 1, description="most examples of one policy")
    max_message_bytes: int = Field(16 * MIB, ge=64 * KIB, le=2**31 - 1, description="largest gRPC message")
    max_queued_steps: int = Field(256, ge=1, description="most steps waiting for one policy; beyond, its streams wait")
    max_queued_bytes: int = Field(256 * MIB, ge=MIB, description="most bytes of steps waiting for one policy")
    max_streams: int = Field(4096, ge=1, description="most open training streams")
    max_concurrent_rpcs: int = Field(8192, ge=1, description="most RPCs at once, streams included")
    first_message_timeout_s: float = Field(10.0, gt=0, description="a stream that has not opened by then is ended")
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
    metrics_max_policies: int = Field(100, ge=0, description="most policies with metrics of their own")

    @model_validator(mode="after")
    def _one_redis_url(self) -> "Settings":
        if self.redis_url is not None and self.redis_url_file is not None:
            raise ValueError("redis_url and redis_url_file are both set: keep one")
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
    def redis(self) -> str | None:
        """URL of Redis, from the file if it was given by file; None: run our own.

        Raises SettingsError for a file that cannot be read or holds no such URL.
        """
        if self.redis_url_file is None:
            return self.redis_url.get_secret_value() if self.redis_url is not None else None
        try:
            url = SecretStr(self.redis_url_file.read_text(encoding="utf-8").strip())
            return _check_redis_url(url).get_secret_value()
        except OSError as error:
            raise SettingsError(f"redis_url_file: {self.redis_url_file}: {error.strerror}") from error
        except ValueError as error:
            raise SettingsError(f"redis_url_file: the URL in {self.redis_url_file} {error}") from error

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


def load(arguments: Sequence[str]) -> Settings:
    """The settings that flags, `EQUIPOISE_*` variables and the file make up.

    Prints help and raises SystemExit for `--help` and for flags it does not know.
    Raises SettingsError, whose message names setting, value and rule.
    """
    known = {ENV_PREFIX + name.upper() for name in _names()}
    for variable in os.environ:
        if variable.startswith(ENV_PREFIX) and variable not in known and variable not in CLIENT_VARIABLES:
            raise SettingsError(f"environment: {_unknown(variable, known)}")
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [--SETTING VALUE]...",
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
    user, _, _ = str(redis_url or "").partition("://")[2].partition("/")[0].rpartition("@")
    if ":" in user:
        raise SettingsError(
            "redis_url: a password in a flag is seen by whoever lists the processes; use redis_url_file"
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
