"""A scanner for what clusters should not run finds nothing in the rendered chart, but for what is so on purpose."""

import json
import shutil
import subprocess
import venv
from pathlib import Path

import pytest

from tests.deploy.rendered import CHART, helm

CACHE = Path(__file__).parents[2] / ".cache" / "checkov"
VERSION = "3.3.30"
ON_PURPOSE = {
    "CKV_K8S_11": "a limit of CPU would stop the event loop for parts of each period",
    "CKV_K8S_15": "tags of releases do not move",
    "CKV_K8S_21": "the namespace is Helm's to say",
    "CKV_K8S_43": "a digest is a value",
}
OF_THE_TEST_POD = {"CKV_K8S_8", "CKV_K8S_9", "CKV2_K8S_6"}
"""It ends by itself, and nothing reaches it."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkov() -> Path:
    """The scanner, in an environment of its own."""
    if (found := shutil.which("checkov")) is not None:
        return Path(found)
    if not (CACHE / "bin" / "checkov").exists():
        venv.create(CACHE, with_pip=True, clear=True)
        command = [CACHE / "bin" / "python", "-m", "pip", "install", "--quiet", f"checkov=={VERSION}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            pytest.skip(f"the chart was not scanned: checkov cannot be installed: {done.stderr[-300:]}")
    return CACHE / "bin" / "checkov"


def failed(checkov: Path, manifests: str, folder: Path) -> set[tuple[str, str]]:
    """Checks that fail, and of what."""
    (folder / "manifests.yaml").write_text(manifests)
    options = (
        "--framework",
        "kubernetes",
        "--output",
        "json",
        "--quiet",
        "--skip-download",
        "--file",
        "manifests.yaml",
    )
    command = [checkov, *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout, done.stderr[-2000:]
    results = json.loads(done.stdout)["results"]
    return {(each["check_id"], each["resource"]) for each in results["failed_checks"]}


def test_nothing_is_found_that_is_not_so_on_purpose(checkov: Path, tmp_path: Path) -> None:
    example = CHART.parent / "examples" / "production.yaml"
    found = failed(checkov, helm("template", "equipoise", CHART, "--values", example).stdout, tmp_path)
    assert {check for check, _ in found} >= {"CKV_K8S_43"}  # it looks at all
    left = {(check, what) for check, what in found if check not in ON_PURPOSE}
    assert {(check, what) for check, what in left if not (check in OF_THE_TEST_POD and "-test" in what)} == set()


def test_a_careless_pod_is_found(checkov: Path, tmp_path: Path) -> None:
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "p"},
        "spec": {"containers": [{"name": "c", "image": "i"}]},
    }
    assert len(failed(checkov, json.dumps(pod), tmp_path)) > 10
