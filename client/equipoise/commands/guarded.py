"""Options with which a command reaches a guarded server: TLS and token."""

import argparse
from dataclasses import replace

from equipoise.security import Security

FILES = {
    "root_certificates": "encrypt, trusting these authorities (PEM)",
    "client_certificate": "certificate to show (PEM)",
    "client_key": "private key of the certificate (PEM)",
    "token_file": "file that holds the token; EQUIPOISE_TOKEN may hold the token itself",
}


def add_security_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--tls`, `--token-file` and so on."""
    guarded = parser.add_argument_group("guarded servers", "Each has a variable too, such as EQUIPOISE_TOKEN_FILE.")
    guarded.add_argument("--tls", action="store_true", default=None, help="encrypt, trusting the usual authorities")
    for name, help_text in FILES.items():
        guarded.add_argument(f"--{name.replace('_', '-')}", metavar="FILE", help=help_text)


def security(options: argparse.Namespace) -> Security:
    """Flags, then the environment. Raises InvalidRequestError where they contradict each other."""
    names = ("tls", *FILES)
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if "token_file" in given:
        given["token"] = None  # the flag takes the place of a token in the environment
    return replace(Security.from_environment(), **given)
