"""Run the policy server."""

import sys
from collections.abc import Sequence

from equipoise_server.settings import SettingsError, load

USAGE_ERROR = 2


def main(arguments: Sequence[str]) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit status, 2 for settings that cannot be used."""
    try:
        settings = load(arguments)
    except SettingsError as error:
        print(f"equipoise serve: {error}", file=sys.stderr)
        return USAGE_ERROR
    if settings.processes > 1:
        from equipoise_server.processes import run_all

        return run_all(settings)
    from equipoise_server.app import run  # after the settings: torch takes seconds to load

    return run(settings)
