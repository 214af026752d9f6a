"""Kubernetes' Pod Security Standard `restricted`: what in a pod's spec breaks it.

Source: the standard's page of Kubernetes' documentation, "Pod Security Standards", for Linux pods.
"""

from collections.abc import Iterator
from typing import Any, TypeAlias

Spec: TypeAlias = dict[str, Any]

VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret",
    "image",
}  # fmt: skip
SECCOMP = ("RuntimeDefault", "Localhost")


def violations(spec: Spec) -> list[str]:
    """Every rule of the standard that a pod's spec breaks, in words."""
    found = [f"{name} is true" for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name)]
    for volume in spec.get("volumes", []):
        found += [f"volume {volume['name']} is a {kind}" for kind in volume.keys() - {"name"} - VOLUMES]
    pod = spec.get("securityContext", {})
    if pod.get("sysctls"):
        found.append("sysctls are set")
    if pod.get("runAsUser") == 0:
        found.append("the pod runs as root")
    for group in ("containers", "initContainers", "ephemeralContainers"):
        for container in spec.get(group, []):
            found += [f"{container['name']}: {each}" for each in _of_container(container, pod)]
    return found


def _of_container(container: Spec, pod: Spec) -> Iterator[str]:
    own = container.get("securityContext", {})
    if own.get("privileged"):
        yield "it is privileged"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation is not false"
    if own.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True:
        yield "runAsNonRoot is not true"
    if own.get("runAsUser", 1) == 0:
        yield "it runs as root"
    if own.get("seccompProfile", pod.get("seccompProfile", {})).get("type") not in SECCOMP:
        yield "there is no seccompProfile"
    if own.get("procMount", "Default") != "Default":
        yield "procMount is set"
    capabilities = own.get("capabilities", {})
    if "ALL" not in capabilities.get("drop", []):
        yield "not all capabilities are dropped"
    if set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
        yield "capabilities are added"
    if any(port.get("hostPort") for port in container.get("ports", [])):
        yield "a hostPort is taken"
    for hook in ("livenessProbe", "readinessProbe", "startupProbe"):
        for action in ("httpGet", "tcpSocket"):
            if container.get(hook, {}).get(action, {}).get("host"):
                yield f"{hook} asks another host"
