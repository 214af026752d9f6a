"""The command line: quick, helpful, and clear about what is missing."""

import subprocess
import sys
from importlib.metadata import EntryPoint, version

import pytest

from equipoise import cli


def commands(**modules: str) -> dict[str, EntryPoint]:
    return {name: EntryPoint(name, value, cli.GROUP) for name, value in modules.items()}


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> dict[str, EntryPoint]:
    """The commands on offer; tests add to them."""
    points: dict[str, EntryPoint] = {}
    monkeypatch.setattr(cli, "commands", lambda: points)
    return points


def test_help_lists_every_command_with_a_line_and_loads_no_heavy_library() -> None:
    code = (
        "import sys; from equipoise.cli import main; status = main(['--help']);"
        "print('LOADED', sorted({'torch', 'redis', 'pydantic', 'typer', 'sklearn'} & set(sys.modules)), status)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "LOADED [] 0" in shown
    for name, point in cli.commands().items():
        assert f"  {name:<11} {cli.summary(point)}\n" in shown
        assert cli.summary(point)


def test_the_promised_commands_are_there() -> None:
    assert {"serve", "demo", "policy", "train"} <= set(cli.commands())


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["help"]])
def test_without_a_command_help_is_printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.startswith("usage: equipoise COMMAND")


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"equipoise {version('equipoise')}\n"


def test_a_misspelt_command_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sevre"]) == cli.USAGE_ERROR
    assert "no command 'sevre': did you mean 'serve'?" in capsys.readouterr().err


def test_an_unknown_command_gets_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["xyzzy"]) == cli.USAGE_ERROR
    assert "demo, policy, repair, reproduce, serve, token, train" in capsys.readouterr().err


def test_a_command_gets_its_arguments_and_gives_the_exit_status(offered: dict[str, EntryPoint]) -> None:
    offered |= commands(count="builtins:len")
    assert cli.main(["count", "a", "b", "--c"]) == 3


def test_a_missing_extra_is_named_with_the_cure(
    offered: dict[str, EntryPoint], capsys: pytest.CaptureFixture[str]
) -> None:
    offered |= commands(serve="surely_not_installed.serve:main [server]")
    assert cli.main(["serve"]) == cli.USAGE_ERROR
    said = capsys.readouterr().err
    assert "'serve' needs surely_not_installed, which is not installed: pip install 'equipoise[server]'" in said


@pytest.mark.parametrize("value", ["equipoise.surely_not_there:main [server]", "surely_not_installed:main"])
def test_a_broken_installation_is_not_taken_for_a_missing_extra(offered: dict[str, EntryPoint], value: str) -> None:
    offered |= commands(serve=value)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["serve"])


def test_the_module_runs_as_the_script_does() -> None:
    run = subprocess.run([sys.executable, "-m", "equipoise", "nonsense"], capture_output=True, text=True, check=False)
    assert run.returncode == cli.USAGE_ERROR
    assert "equipoise: no command 'nonsense'" in run.stderr


def test_a_reader_that_leaves_early_is_no_error() -> None:
    code = "import sys; from equipoise import cli; cli.overview = lambda: 'x' * 10_000_000; sys.exit(cli.main([]))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == cli.BROKEN_PIPE
