"""Prints what is installed in this Python's environment as a bill of materials, CycloneDX 1.5 in JSON.

The image has it in /opt/equipoise/sbom.json. Debian's packages are not in it: scanners read their own list.
"""

import json
import sys
from importlib.metadata import Distribution, distributions
from typing import Any

MAIN = "equipoise"


def component(found: Distribution) -> dict[str, Any]:
    """One distribution."""
    name = found.metadata["Name"].lower().replace("_", "-")
    purl = f"pkg:pypi/{name}@{found.version.replace('+', '%2B')}"
    described: dict[str, Any] = {
        "type": "library",
        "bom-ref": purl,
        "name": name,
        "version": found.version,
        "purl": purl,
    }
    licence = found.metadata.get("License-Expression")
    return described | ({"licenses": [{"expression": licence}]} if licence else {})


def bill() -> dict[str, Any]:
    """The whole bill; the same for the same environment."""
    every = sorted((component(found) for found in distributions()), key=lambda each: each["name"])
    python = {"type": "platform", "name": "cpython", "version": sys.version.split()[0]}
    [main] = [each for each in every if each["name"] == MAIN]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": main | {"type": "application"}},
        "components": [python, *(each for each in every if each is not main)],
    }


if __name__ == "__main__":
    print(json.dumps(bill(), indent=1))
