"""The end of a certificate is what another library reads in it."""

from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509

from equipoise_server.security.expiry import expires
from tests.e2e.security.authority import Authority


@pytest.mark.parametrize("days", [-1, 0, 90, 365 * 22, 365 * 30])  # UTCTime ends with 2049
def test_the_end_is_read(tmp_path: Path, days: int) -> None:
    authority = Authority(tmp_path)
    pem = authority.issue("server", ends=timedelta(days=days, seconds=5)).certificate.read_text()
    end = x509.load_pem_x509_certificate(pem.encode()).not_valid_after_utc.timestamp()
    assert expires(pem) == end
    assert expires(f"words before\n{pem}{authority.file.read_text()}") == end  # the first of a chain


@pytest.mark.parametrize("text", ["", "words", "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n"])
def test_what_is_no_certificate_is_said_to_be_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"no X\.509 certificate"):
        expires(text)
