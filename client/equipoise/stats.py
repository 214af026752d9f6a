"""Counters of one client."""

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class Stats:
    """Counts since the client was made.

    Attributes:
        steps: steps made, by `step` and `submit`.
        applied: steps answered as applied.
        duplicates: steps answered as applied before.
        refused: steps the server refused.
        fallbacks: steps and reads answered without the server, from older weights or uniformly.
        reconnects: streams opened after the first.
        outages: times the server was lost or did not answer in time.
        dropped: steps whose statistics were dropped because the window was full.
        forgotten: answered steps that were let go before they were durable because the window was full.
        lost: steps the server had acknowledged and has lost.
        regressions: times the policy's (epoch, version) went back.
        unacked: steps that wait for their answer now.
        undurable: steps that are kept for replay now.
        longest_stall: longest wait of a step or read, seconds.
    """

    steps: int = 0
    applied: int = 0
    duplicates: int = 0
    refused: int = 0
    fallbacks: int = 0
    reconnects: int = 0
    outages: int = 0
    dropped: int = 0
    forgotten: int = 0
    lost: int = 0
    regressions: int = 0
    unacked: int = 0
    undurable: int = 0
    longest_stall: float = 0.0
