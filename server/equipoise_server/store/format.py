"""The number of the format in which a policy is stored: what an older release must not misread carries a higher one.

It stands in the policy's specification. A server raises it as it takes the policy over, before it writes anything else,
and takes over none whose number it does not know. Raise FORMAT whenever a release of before would read what is written
wrongly or not at all: a field or key that it would overlook, an encoding, a meaning. A new rule, or a new setting of
one, needs no new number: a server that does not know them refuses that policy by itself. A field that a step gains for
a rule of before, which would then be replayed without it, does. Two tests list what is stored: `test_format.py` of the
store, and `test_stored_fields.py` of the engine.
"""

FORMAT = 2
"""What this release writes. Since 2 specifications, entries, pages and headers have checksums, and pages a list."""

FIRST_FORMAT = 1
"""The oldest that it reads, and what release 0.1.0 wrote, without a number."""


def number(field: bytes | str | None) -> int:
    """The format that a specification's field names."""
    return int(field) if field else FIRST_FORMAT
