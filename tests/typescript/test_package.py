"""The package as a whole: its own tests, its README, and what would be published."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from tests.servers import ServerProcess
from tests.typescript.node import PACKAGE, run

TEST_SECONDS = 120


@pytest.mark.slow
def test_its_own_tests_pass() -> None:
    tested = run("node", "--test", *sorted((PACKAGE / "test").glob("*.test.mjs")), cwd=PACKAGE, timeout=TEST_SECONDS)
    assert tested.returncode == 0, tested.stdout
    passed = re.search(r"^# pass (\d+)$", tested.stdout, re.MULTILINE)
    assert passed
    assert int(passed[1]) > 40


def test_the_readme_compiles_and_keeps_its_word(server: ServerProcess) -> None:
    [code] = re.findall(r"```ts\n(.*?)```", (PACKAGE / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    folder = PACKAGE / "build"  # inside the package, which finds itself by its name
    folder.mkdir(exist_ok=True)
    try:
        (folder / "readme.ts").write_text(code, encoding="utf-8")
        flags = "--strict --noUncheckedIndexedAccess --skipLibCheck --target es2022 --module nodenext --lib es2023"
        compiled = run("npx", "tsc", *flags.split(), "build/readme.ts", cwd=PACKAGE, timeout=TEST_SECONDS)
        assert compiled.returncode == 0, compiled.stdout
        environment = {**os.environ, "ADDRESS": server.address}
        shown = run("node", folder / "readme.js", env=environment, timeout=TEST_SECONDS)
        assert shown.returncode == 0, shown.stderr
        found = re.match(r"(\d+) of the 40 examples", shown.stdout)
        assert found, shown.stdout
        assert int(found[1]) > 30
    finally:
        shutil.rmtree(folder)


def test_what_is_published_is_what_was_built_and_the_contract() -> None:
    packed = run("npm", "pack", "--dry-run", "--json", cwd=PACKAGE, timeout=TEST_SECONDS)
    files = {file["path"] for file in json.loads(packed.stdout)[0]["files"]}
    assert {"dist/index.js", "dist/index.d.ts", "dist/proto/equipoise/v1/policy.proto"} <= files
    assert "dist/proto/google/rpc/status.proto" in files
    assert {Path(file).parts[0] for file in files} == {"dist", "README.md", "package.json"}


def test_what_is_installed_is_pinned_and_may_come_from_any_registry() -> None:
    lock = json.loads((PACKAGE / "package-lock.json").read_text(encoding="utf-8"))
    packages = {name: entry for name, entry in lock["packages"].items() if name}
    assert all("integrity" in entry and "resolved" not in entry for entry in packages.values())
    manifest = json.loads((PACKAGE / "package.json").read_text(encoding="utf-8"))
    wanted = manifest["dependencies"] | manifest["devDependencies"]
    assert {name: packages[f"node_modules/{name}"]["version"] for name in wanted} == wanted
