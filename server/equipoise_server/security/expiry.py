"""When a certificate ends: the one thing that we read in it ourselves (X.509, RFC 5280, section 4.1)."""

import ssl
from collections.abc import Iterator
from datetime import UTC, datetime

UTC_TIME, EXPLICIT_VERSION = 0x17, 0xA0
END = "-----END CERTIFICATE-----"


def expires(pem: str) -> float:
    """End of the first certificate in a PEM text, seconds since the epoch. Raises ValueError when it is none."""
    start, end, _ = pem.partition(END)
    try:
        der = ssl.PEM_cert_to_DER_cert(start[start.find("-----BEGIN CERTIFICATE") :] + end)
        _, certificate = next(_elements(der))
        _, signed = next(_elements(certificate))
        fields = [content for tag, content in _elements(signed) if tag != EXPLICIT_VERSION]
        _, (tag, end_time) = _elements(fields[3])  # behind serial number, signature algorithm and issuer
    except (IndexError, StopIteration, ValueError) as error:
        raise ValueError("no X.509 certificate") from error
    text = end_time.decode("ascii")
    if tag == UTC_TIME:  # two digits of the year: 1950 to 2049
        text = ("20" if int(text[:2]) < 50 else "19") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Tags and contents of the DER elements that follow one another."""
    at = 0
    while at < len(data):
        tag, length, start = data[at], data[at + 1], at + 2
        if length >= 0x80:
            size = length & 0x7F
            length, start = int.from_bytes(data[start : start + size], "big"), start + size
        at = start + length
        yield tag, data[start:at]
