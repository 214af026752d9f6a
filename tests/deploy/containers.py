"""Containers for tests: podman with a storage of the tests' own, and the image that is built of the project."""

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMAGE = ROOT / "deploy" / "image"
CACHE = ROOT / ".cache" / "containers"
BASES = ("localhost/debian:bookworm", "debian:bookworm-slim")
TAG = "localhost/equipoise-test:cpu"
NOT_RUN = "no container was run: "


@dataclass(frozen=True)
class Containers:
    """podman and buildah, with a storage of the tests' own."""

    environment: dict[str, str]

    def __call__(self, *command: str | Path, check: bool = True, timeout_s: float = 60) -> str:
        """Runs a command; what it prints."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        assert not check or done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return done.stdout.strip() if done.returncode == 0 else ""

    def logs(self, container: str) -> str:
        """What a container has printed."""
        command = ("podman", "logs", container)
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout + done.stderr


@pytest.fixture(scope="session")
def containers() -> Containers:
    lacking = [name for name in ("podman", "buildah", "runc") if shutil.which(name) is None]
    if lacking:
        pytest.skip(f"{NOT_RUN}there is no {', '.join(lacking)}; on Debian: apt-get install podman buildah runc")
    if os.geteuid():
        pytest.skip(f"{NOT_RUN}it needs root, for its storage")
    CACHE.mkdir(parents=True, exist_ok=True)
    limits = 'default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]'
    engine = 'cgroup_manager = "cgroupfs"\nruntime = "runc"'
    (CACHE / "containers.conf").write_text(f"[containers]\n{limits}\n[engine]\n{engine}\n")
    runs = Path(tempfile.gettempdir()) / "equipoise-containers"
    storage = f'[storage]\ndriver = "overlay"\nrunroot = "{runs}"\ngraphroot = "{CACHE / "storage"}"\n'
    (CACHE / "storage.conf").write_text(storage)
    return Containers(
        {
            **os.environ,
            "CONTAINERS_CONF": str(CACHE / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(CACHE / "storage.conf"),
        }
    )


@pytest.fixture(scope="session")
def base(containers: Containers) -> str:
    """An image of Debian: one that is here, one that can be pulled, or one made by debootstrap."""
    for name in BASES:
        if containers("podman", "images", "--quiet", name):
            return name
    if containers("podman", "pull", "--quiet", BASES[1], check=False, timeout_s=120):
        return BASES[1]
    if shutil.which("debootstrap") is None:
        pytest.skip(f"{NOT_RUN}there is no image of Debian to be had, and no debootstrap to make one")
    with tempfile.TemporaryDirectory() as root:
        try:
            containers("debootstrap", "--variant=minbase", "bookworm", root, timeout_s=600)
        except AssertionError as error:
            pytest.skip(f"{NOT_RUN}debootstrap made no image of Debian: {str(error)[-300:]}")
        for waste in ("var/cache/apt/archives", "var/lib/apt/lists"):
            shutil.rmtree(Path(root) / waste, ignore_errors=True)
        with tempfile.NamedTemporaryFile(suffix=".tar") as packed:
            containers("tar", "--directory", root, "--create", "--file", packed.name, ".", timeout_s=300)
            containers("podman", "import", packed.name, BASES[0], timeout_s=300)
    return BASES[0]


@pytest.fixture(scope="session")
def image(containers: Containers, base: str) -> str:
    """The image for CPUs: TEST_IMAGE, or one built now; what this machine tells pip holds for the build, too."""
    if built := os.environ.get("TEST_IMAGE"):
        return built
    options = ["--build-arg", f"BASE={base}", "--build-arg", "VERSION=1.2.3", "--build-arg", "REVISION=abc"]
    for variable, inside in (("PIP_FIND_LINKS", "/wheels"), ("PIP_CERT", "/authorities.crt")):
        if given := os.environ.get(variable):
            options += ["--build-arg", f"{variable}={inside}", "--volume", f"{given}:{inside}:ro"]
    if given := os.environ.get("PIP_EXTRA_INDEX_URL"):
        options += ["--build-arg", f"PIP_EXTRA_INDEX_URL={given}"]
    containers(
        *("buildah", "bud", "--layers", "--isolation", "chroot", "--network", "host"),
        *("--file", IMAGE / "Containerfile", "--target", "cpu", "--tag", TAG, *options, ROOT),
        timeout_s=1800,
    )
    return TAG
