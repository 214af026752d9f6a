"""Addresses `HOST:PORT`: what one is, where it can be bound, and what others reach it by."""

import ipaddress
import re
import socket
from collections.abc import Mapping
from contextlib import suppress

ADDRESS = re.compile(r"(?P<host>\[[0-9a-fA-F:.%]+\]|[^\s:/\[\]]*):(?P<port>\d{1,5})")

EVERYWHERE = ("", "0.0.0.0", "::")
"""Hosts that are every interface."""

POD_IP = "POD_IP"
"""Variable that holds a pod's address, by a `fieldRef` to `status.podIP`."""
UNEXPANDED = re.compile(r"\$\(\w+\)|\$\{\w+\}|\$\w+|\{\{.*?\}\}")
"""A variable in the place of its value: Kubernetes leaves `$(NAME)` as it is where NAME comes later, or never."""
_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?")

IN_KUBERNETES = "KUBERNETES_SERVICE_HOST"
"""Variable that Kubernetes sets in every pod."""


def host_and_port(address: str) -> tuple[str, int]:
    """Splits `HOST:PORT`; an empty host is every interface, IPv6 hosts stand in brackets and come back without.

    Raises ValueError for anything else.
    """
    match = ADDRESS.fullmatch(address)
    if match is None or int(match["port"]) > 65_535:
        raise ValueError("is not HOST:PORT, such as 127.0.0.1:50051, [::1]:50051 or :0 for a free port")
    return match["host"].strip("[]"), int(match["port"])


def joined(host: str, port: int) -> str:
    """`HOST:PORT`, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bindable(address: str) -> str:
    """`HOST:PORT` with a host: no host is every interface, over IPv6 and IPv4 where this machine has both."""
    host, port = host_and_port(address)
    return address if host else f"{'[::]' if socket.has_dualstack_ipv6() else '0.0.0.0'}:{port}"


def is_loopback(address: str) -> bool:
    """Whether `HOST:PORT` is reached from this machine alone."""
    host, _ = host_and_port(address)
    try:
        return host == "localhost" or ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:  # any other name may be anywhere, and no name is everywhere
        return False


def check_reachable(address: str) -> None:
    """Raises ValueError for a `HOST:PORT` by which nobody can reach a server, wherever it is."""
    if found := UNEXPANDED.search(address):
        raise ValueError(
            f"still holds {found[0]}, a variable that was not expanded: in a pod, `env` must define it above this one"
        )
    host, port = host_and_port(address)
    if host in EVERYWHERE:
        raise ValueError("is every interface, which is no address that anybody can reach")
    if port == 0:
        raise ValueError("has port 0, at which nobody can be reached")
    if ":" not in host and not _NAME.fullmatch(host):
        raise ValueError(f"has a host, {host!r}, that is neither a name nor an address")


def reachable(address: str, environment: Mapping[str, str]) -> str:
    """What others reach a listening address by, as far as can be known: itself, unless it is every interface.

    Then it is this machine's name; in a pod, whose name nobody resolves, the pod's own address.
    """
    host, port = host_and_port(address)
    if host not in EVERYWHERE:
        return address
    return joined(_pod_ip(environment) or socket.gethostname(), port)


def _pod_ip(environment: Mapping[str, str]) -> str:
    """The address of the pod that this is; empty: it is none, or nobody says."""
    with suppress(ValueError):
        return str(ipaddress.ip_address(environment.get(POD_IP, "")))
    if environment.get(IN_KUBERNETES):
        with suppress(OSError):
            found = socket.gethostbyname(socket.gethostname())  # from /etc/hosts, where Kubernetes puts it
            if not ipaddress.ip_address(found).is_loopback:
                return found
    return ""
