"""The repository keeps what its documents promise."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TARGETS = ("setup", "demo", "test", "test-slow", "soak", "check", "bench", "proto", "vectors")
FOLDERS = {"proto", "server", "client", "trainer", "deploy", "tests", ".ci"}


def text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("target", TARGETS)
def test_make_knows_its_targets_and_helps(target: str) -> None:
    assert re.search(rf"^{target}:.* ## \w", text("Makefile"), re.MULTILINE)


def test_continuous_integration_calls_the_same_targets_as_people() -> None:
    script = text(".ci/run")
    assert [line for line in script.splitlines() if "make" in line and not line.startswith("#")] == [
        "make check",
        "make test",
        "timeout 45m make test-slow",
    ]
    subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=True)


def test_the_readme_starts_with_the_two_commands() -> None:
    assert re.search(r"^make demo\b.*\n(.*\n)*?make test\b", text("README.md"), re.MULTILINE)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "deploy/README.md"])
def test_what_the_documents_link_to_exists(document: str) -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", text(document))
    assert [target for target in targets if not ((ROOT / document).parent / target).exists()] == []


def test_the_top_level_holds_the_promised_folders_only() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert {line.split("/")[0] for line in listed.splitlines() if "/" in line} <= FOLDERS


def test_the_contract_is_linted_by_the_whole_standard() -> None:
    assert "use: [STANDARD, COMMENTS]" in text("proto/buf.yaml")
