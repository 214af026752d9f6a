"""How large one command to Redis may be: a long command delays every other policy behind it."""

MAX_APPEND_BYTES = 128 * 1024
"""Bytes of log entries in one append. A single larger entry travels alone, since an entry is never cut."""

MAX_COMMAND_BYTES = 256 * 1024
"""Bytes of one page-writing command, its arguments together."""

READ_CHUNK_BYTES = 1024 * 1024
"""Bytes that one read of the log aims at."""

READ_CHUNK_ENTRIES = 1024
"""Entries that one read of the log never exceeds."""
