"""Settings: flags beat variables beat the file, and what is wrong is said aloud."""

import os
from pathlib import Path

import pytest

from equipoise_server.addresses import host_and_port
from equipoise_server.redis_url import RedisAccess, RedisUrl
from equipoise_server.settings import ENV_PREFIX, Settings, SettingsError, load

TLS = ("--tls-certificate", "c", "--tls-key", "k")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith(ENV_PREFIX)]:
        monkeypatch.delenv(variable)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "equipoise.toml"


def problem(*arguments: str) -> str:
    with pytest.raises(SettingsError) as caught:
        load(arguments)
    return str(caught.value)


def test_without_anything_the_server_listens_to_this_machine_alone_and_brings_its_redis() -> None:
    settings = load([])
    assert settings.listen == "127.0.0.1:50051"
    assert settings.metrics_listen == "127.0.0.1:9464"
    assert settings.redis is None


def test_flags_beat_variables_beat_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text('listen = "127.0.0.1:1"\nmax_streams = 11\ndrain_grace_s = 1.5\n')
    monkeypatch.setenv("EQUIPOISE_CONFIG", str(file))
    monkeypatch.setenv("EQUIPOISE_LISTEN", "127.0.0.1:2")
    monkeypatch.setenv("EQUIPOISE_MAX_STREAMS", "12")
    settings = load(["--listen", "127.0.0.1:3"])
    assert (settings.listen, settings.max_streams, settings.drain_grace_s) == ("127.0.0.1:3", 12, 1.5)


def test_the_flag_for_the_file_beats_the_variable(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("max_streams = 11\n")
    monkeypatch.setenv("EQUIPOISE_CONFIG", str(file.with_name("absent.toml")))
    assert load(["--config", str(file)]).max_streams == 11


def test_an_unknown_variable_is_an_error_that_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQUIPOISE_LISTN", ":1")
    assert problem() == "environment: EQUIPOISE_LISTN is no setting; did you mean EQUIPOISE_LISTEN?"


def test_an_unknown_name_in_the_file_is_an_error_that_names_the_nearest(file: Path) -> None:
    file.write_text("max_stream = 1\n")
    assert problem("--config", str(file)) == f"{file}: max_stream is no setting; did you mean max_streams?"


def test_an_unknown_flag_ends_with_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load(["--max-stream", "1"])  # no abbreviation either
    assert caught.value.code == 2
    assert "--max-stream" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--listen", "here"], "listen: 'here' is not HOST:PORT"),
        (
            ["--advertise", "$(POD_NAME).equipoise-pods:50051"],
            "advertise: '$(POD_NAME).equipoise-pods:50051' still holds $(POD_NAME), a variable that was not expanded",
        ),
        (["--advertise", "${HOST}:1"], "advertise: '${HOST}:1' still holds ${HOST}, a variable"),
        (["--advertise", "$HOST:1"], "advertise: '$HOST:1' still holds $HOST, a variable"),
        (["--advertise", ":1"], "advertise: ':1' is every interface, which is no address"),
        (["--advertise", "0.0.0.0:1"], "advertise: '0.0.0.0:1' is every interface"),
        (["--advertise", "[::]:1"], "advertise: '[::]:1' is every interface"),
        (["--advertise", "here:0"], "advertise: 'here:0' has port 0"),
        (["--advertise", "a,b:1"], "advertise: 'a,b:1' has a host, 'a,b', that is neither"),
        (["--advertise", "here"], "advertise: 'here' is not HOST:PORT"),
        (["--listen", "::1:50051"], "listen: '::1:50051' is not HOST:PORT"),
        (["--listen", ":65536"], "listen: ':65536' is not HOST:PORT"),
        (["--max-streams", "0"], "max_streams: '0' should be greater than or equal to 1"),
        (["--max-streams", "many"], "max_streams: 'many' should be a valid integer"),
        (["--log-timeout-s", "0"], "log_timeout_s: '0' should be greater than 0"),
        (["--config", "/absent/equipoise.toml"], "config: /absent/equipoise.toml: No such file"),
        (
            ["--listen", ":1"],
            "listen: ':1' is reached from other machines, which needs TLS (tls_certificate, tls_key) and",
        ),
        (
            ["--listen", "10.0.0.1:1", "--tokens-file", "t"],
            "listen: '10.0.0.1:1' is reached from other machines, which",
        ),
        (["--listen", "host:1", *TLS], "listen: 'host:1' is reached from other machines, which needs authentication"),
        (["--tls-key", "k"], "tls_certificate and tls_key: one is set"),
        (["--tls-client-ca", "c"], "tls_client_ca is set without tls_certificate"),
        (["--redis-url", "redis://user:secret@redis"], "redis_url: a password in a flag is seen by whoever lists"),
        (["--redis-url", "http://redis"], "redis_url: must start with one of redis://"),
        (["--redis-url", "redis://a", "--redis-url-file", "b"], "redis_url and redis_url_file are both set"),
    ],
)
def test_a_value_out_of_rule_is_named_with_the_rule(arguments: list[str], said: str) -> None:
    assert problem(*arguments).startswith(said)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--listen", "[::1]:1"],
        ["--listen", "localhost:1"],
        ["--listen", "127.0.0.9:1", "--tokens-file", "t"],
        ["--listen", ":1", "--allow-insecure", "true"],
        ["--listen", ":1", *TLS, "--tokens-file", "t"],
        ["--listen", ":1", *TLS, "--tls-client-ca", "c"],
        ["--redis-url", "redis://user@redis"],
    ],
)
def test_what_is_guarded_or_stays_on_this_machine_may_listen(arguments: list[str]) -> None:
    load(arguments)


def test_the_clients_variables_are_not_mistaken_for_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQUIPOISE_TOKEN", "x")
    monkeypatch.setenv("EQUIPOISE_ROOT_CERTIFICATES", "x")
    load([])


def test_a_file_that_is_not_toml_is_named(file: Path) -> None:
    file.write_text("listen =")
    assert f"{file} is not TOML" in problem("--config", str(file))


def test_a_bad_variable_is_named_by_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQUIPOISE_DEVICE", "gpu")
    assert problem() == "device: 'gpu' should be 'auto', 'cpu' or 'cuda'"


def test_the_redis_url_may_come_from_a_file(tmp_path: Path) -> None:
    secret = tmp_path / "url"
    secret.write_text("rediss://:secret@redis:6379/0\n")
    assert load(["--redis-url-file", str(secret)]).redis == RedisUrl.parse("rediss://:secret@redis:6379/0")


def test_a_file_without_a_redis_url_is_named_but_not_quoted(tmp_path: Path) -> None:
    secret = tmp_path / "url"
    secret.write_text("secret@redis")
    with pytest.raises(SettingsError, match="redis_url_file") as caught:
        _ = load(["--redis-url-file", str(secret)]).redis
    assert "secret@" not in str(caught.value)


def test_passwords_are_neither_shown_nor_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQUIPOISE_REDIS_URL", "redis://:secret@redis")
    assert "secret" not in repr(load([]))
    monkeypatch.setenv("EQUIPOISE_REDIS_URL", "http://:secret@redis")
    assert "secret" not in problem()


def test_help_describes_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load(["--help"])
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')} " in shown
        assert field.description
        assert field.description.split(";")[0] in shown


@pytest.mark.parametrize(
    ("address", "parts"),
    [(":0", ("", 0)), ("localhost:50051", ("localhost", 50051)), ("[::1]:9464", ("::1", 9464))],
)
def test_addresses_are_split(address: str, parts: tuple[str, int]) -> None:
    assert host_and_port(address) == parts


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load([]).listen = ":1"  # type: ignore[misc]


def test_what_kubernetes_sets_beside_a_service_of_our_name_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Service links (docker's, once): see kubernetes.io, "Discovering services"."""
    for name in ("EQUIPOISE", "EQUIPOISE_HEADLESS", "EQUIPOISE_REDIS"):
        monkeypatch.setenv(f"{name}_SERVICE_HOST", "10.96.0.7")
        monkeypatch.setenv(f"{name}_SERVICE_PORT", "50051")
        monkeypatch.setenv(f"{name}_SERVICE_PORT_GRPC", "50051")
        monkeypatch.setenv(f"{name}_PORT", "tcp://10.96.0.7:50051")
        monkeypatch.setenv(f"{name}_PORT_50051_TCP", "tcp://10.96.0.7:50051")
        monkeypatch.setenv(f"{name}_PORT_50051_TCP_PROTO", "tcp")
        monkeypatch.setenv(f"{name}_PORT_50051_TCP_PORT", "50051")
        monkeypatch.setenv(f"{name}_PORT_50051_TCP_ADDR", "10.96.0.7")
    load([])
    monkeypatch.setenv("EQUIPOISE_LISTENS", ":1")
    assert problem() == "environment: EQUIPOISE_LISTENS is no setting; did you mean EQUIPOISE_LISTEN?"


@pytest.mark.parametrize("name", [name for name in Settings.model_fields if name.endswith(("_file", "_key", "_ca"))])
def test_an_empty_path_is_refused_and_not_taken_for_this_folder(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"EQUIPOISE_{name.upper()}", "")
    assert problem() == f"{name}: '' is empty: name a file, or leave the setting out"


def test_credentials_of_redis_may_be_kept_apart_from_its_url(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("p/?#@ w \n")
    (tmp_path / "guards").write_text("sp\r\n")
    (tmp_path / "ca.pem").write_text("x")
    settings = load(
        [
            *("--redis-url", "rediss+sentinel://a,b/main", "--redis-tls-ca", str(tmp_path / "ca.pem")),
            *("--redis-username", "eq", "--redis-password-file", str(tmp_path / "password")),
            *("--redis-sentinel-username", "su", "--redis-sentinel-password-file", str(tmp_path / "guards")),
        ]
    )
    assert settings.redis_access == RedisAccess(
        username="eq",
        password="p/?#@ w ",
        sentinel_username="su",
        sentinel_password="sp",
        tls_ca=tmp_path / "ca.pem",
    )
    assert "p/?#@" not in repr(settings.redis_access)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--redis-password-file", "{here}"], "redis_password_file: is set, but there is no redis_url"),
        (
            ["--redis-url-file", "{url}", "--redis-password-file", "{here}"],
            "redis_password_file: is set, but redis_url holds one, too: keep one",
        ),
        (["--redis-url", "redis://h", "--redis-password-file", "/none"], "redis_password_file: /none: No such file"),
        (
            ["--redis-url", "redis://h", "--redis-password-file", "{binary}"],
            "redis_password_file: {binary} is not UTF-8",
        ),
        (
            ["--redis-url", "redis://h", "--redis-sentinel-username", "u"],
            "redis_sentinel_username: is set, but redis_url",
        ),
        (
            ["--redis-url", "redis://h", "--redis-tls-ca", "{here}"],
            "redis_tls_ca: is set, but redis_url is without TLS",
        ),
        (["--redis-url", "rediss://h", "--redis-tls-ca", "/none"], "redis_tls_ca: /none: No such file"),
    ],
)
def test_credentials_given_twice_or_without_a_use_are_refused(tmp_path: Path, arguments: list[str], said: str) -> None:
    files = {"here": tmp_path / "here", "url": tmp_path / "url", "binary": tmp_path / "binary"}
    files["here"].write_text("secret")
    files["url"].write_text("redis://:secret@h")
    files["binary"].write_bytes(b"\xff\xfesecret")
    settings = load([argument.format(**files) for argument in arguments])
    with pytest.raises(SettingsError) as caught:
        _ = settings.redis_access
    assert str(caught.value).startswith(said.format(**files))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("special", ["/", "?", "#", "@", "%", ":", "[", "]"])
@pytest.mark.parametrize("source", ["variable", "file", "toml"])
def test_no_spelling_of_a_password_reaches_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, special: str, source: str
) -> None:
    url = f"redis://:hunter{special}two@h:x"
    where = tmp_path / "file"
    arguments = []
    match source:
        case "variable":
            monkeypatch.setenv("EQUIPOISE_REDIS_URL", url)
        case "file":
            where.write_text(url)
            arguments = ["--redis-url-file", str(where)]
        case "toml":
            where.write_text(f'redis_url = "{url}"')
            arguments = ["--config", str(where)]
    with pytest.raises(SettingsError) as caught:
        _ = load(arguments).redis
    assert "redis_url" in str(caught.value)
    assert "hunter" not in str(caught.value)
    assert "two" not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    ["pod-0.pods.ml.svc.cluster.local:50051", "pod-0.pods.ml.svc.:1", "10.0.0.1:1", "[fd00::1]:1", "my_host:1"],
)
def test_what_others_may_reach_is_advertised(address: str) -> None:
    assert load(["--advertise", address]).advertise == address
