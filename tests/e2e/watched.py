"""What a server answers to those who watch it."""

import re
import urllib.error
import urllib.request

PREFIX = "equipoise_server_"


def page(address: str, path: str) -> tuple[int, str]:
    """Status and text of a page of the metrics address."""
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def series(address: str) -> dict[str, float]:
    """Every series of ours by its text without the prefix, such as `ready` or `refusals_total{reason="BUG"}`."""
    code, text = page(address, "/metrics")
    assert code == 200
    found = re.findall(rf"^{PREFIX}(\S+) (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}
