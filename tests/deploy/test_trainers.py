"""The examples of training jobs: Kubernetes takes them, and what they run trains a policy."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from equipoise import PolicyAdmin
from tests.deploy.pod_security import violations
from tests.deploy.rendered import CHART, DEPLOY, VERSIONS, Objects, kustomized, rendered
from tests.ports import free_port
from tests.servers import ServerProcess, serve

FOLDERS = {name: DEPLOY / "trainers" / name for name in ("job", "pytorchjob", "rayjob")}
PATIENCE_S = 240.0
FOUND = 0.5
"""At least this share of the lowest scores is of wrong labels; by chance it is a fifth."""


def templates(objects: Objects) -> list[dict[str, Any]]:
    """Pod templates wherever a job has them."""

    def found(value: Any) -> Iterator[dict[str, Any]]:
        if isinstance(value, dict):
            for name, inner in value.items():
                if name == "template" and "spec" in inner:
                    yield inner
                yield from found(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from found(inner)

    return list(found(list(objects.values())))


@pytest.mark.parametrize("folder", FOLDERS.values(), ids=FOLDERS)
def test_the_pods_are_what_kubernetes_takes_and_run_the_script(folder: Path) -> None:
    objects = kustomized(folder)
    [(_, script)] = [key for key in objects if key[0] == "ConfigMap"]
    assert objects["ConfigMap", script]["data"] == {"train.py": (folder / "train.py").read_text(encoding="utf-8")}
    pods = templates(objects)
    assert len(pods) == (1 if folder.name == "job" else 2)
    for template in pods:
        spec = template["spec"]
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", **template["metadata"]}, "spec": spec}
        kubernetes_validate.validate(pod, VERSIONS[-1], strict=True)
        assert violations(spec) == []
        [container], [volume] = spec["containers"], spec["volumes"]
        assert volume["configMap"]["name"] == script
        [mount] = container["volumeMounts"]
        assert f"{mount['mountPath']}/train.py" in str(
            container.get("command") or objects.one("RayJob")["spec"]["entrypoint"]
        )


@pytest.mark.parametrize("folder", FOLDERS.values(), ids=FOLDERS)
def test_they_ask_the_service_that_the_chart_makes(folder: Path) -> None:
    trial = rendered(CHART.parent / "examples" / "trial.yaml")
    services = {
        f"{each['metadata']['name']}:{port['port']}" for each in trial.of("Service") for port in each["spec"]["ports"]
    }
    text = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*job.yaml"))
    [address] = set(re.findall(r'POLICY_SERVER(?:, value)?: "([^"]+)"', text))
    assert address in services


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with serve() as process:
        yield process


def run(server: ServerProcess, *command: str | Path, policy: str, **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "POLICY_SERVER": server.address, "POLICY_NAME": policy, **variables}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def share_found(process: subprocess.Popen[str]) -> float:
    """What a script says of the wrong labels, once it has ended well."""
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors[-3000:]
    [percent] = re.findall(r"^(\d+)% of .* are mislabelled$", output, re.MULTILINE)
    return int(percent) / 100


def test_both_pods_of_the_job_train_one_policy(server: ServerProcess) -> None:
    script = FOLDERS["job"] / "train.py"
    pods = [run(server, sys.executable, script, policy="job", JOB_COMPLETION_INDEX=str(index)) for index in range(2)]
    assert min(share_found(pod) for pod in pods) > FOUND
    with PolicyAdmin(server.address) as admin:
        assert admin.get("job").version == 2 * 300


@pytest.mark.slow
def test_both_processes_of_the_pytorch_job_train_one_policy(server: ServerProcess) -> None:
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()))
    process = run(server, sys.executable, *torchrun, FOLDERS["pytorchjob"] / "train.py", policy="pytorchjob")
    assert share_found(process) > FOUND
    with PolicyAdmin(server.address) as admin:
        assert admin.get("pytorchjob").version == 2 * 10 * 2000 // 2 // 50


@pytest.mark.slow
def test_the_workers_of_the_ray_job_train_one_policy(server: ServerProcess) -> None:
    pytest.importorskip("ray", reason="the Ray job was not run: there is no ray in this environment")
    process = run(server, sys.executable, FOLDERS["rayjob"] / "train.py", policy="rayjob")
    assert share_found(process) > FOUND
    with PolicyAdmin(server.address) as admin:
        assert admin.get("rayjob").version == 2 * 300
