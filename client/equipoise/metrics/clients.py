"""The clients of a process and what is told of them, policy by policy, whatever they are shown with."""

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from equipoise.options import Client, SessionOptions
from equipoise.results import Stats

ROUND_TRIP = "round_trip"
ROUND_TRIP_HELP = "Time from the call of a step or read to its answer."
ROUND_TRIP_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
"""Seconds: from a server on the same machine to a client's longest patience."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One number of each policy.

    Attributes:
        name: without a prefix.
        meaning: what it tells.
        of: the number of one client.
        together: of the numbers of all clients of a policy.
    """

    name: str
    meaning: str
    of: Callable[[Stats, SessionOptions], float]
    together: Callable[[Iterable[float]], float] = sum


COUNTERS = (
    Reading(name="steps", meaning="Steps that were made.", of=lambda stats, options: stats.steps),
    Reading(
        name="fallbacks",
        meaning="Steps and reads answered without the server, from older weights or uniformly.",
        of=lambda stats, options: stats.fallbacks,
    ),
    Reading(
        name="reconnects",
        meaning="Streams opened after the first of a client.",
        of=lambda stats, options: stats.reconnects,
    ),
    Reading(
        name="outages",
        meaning="Times that the server was lost, or did not answer in time.",
        of=lambda stats, options: stats.outages,
    ),
    Reading(
        name="dropped_steps",
        meaning="Steps whose statistics were dropped because the window was full.",
        of=lambda stats, options: stats.dropped,
    ),
    Reading(
        name="forgotten_steps",
        meaning="Answered steps that were let go before they were durable because the window was full.",
        of=lambda stats, options: stats.forgotten,
    ),
    Reading(
        name="lost_steps",
        meaning="Steps that the server had acknowledged and has lost.",
        of=lambda stats, options: stats.lost,
    ),
)
"""They go on after a client was closed."""

GAUGES = (
    Reading(name="clients", meaning="Clients that are open.", of=lambda stats, options: 1),
    Reading(
        name="connected",
        meaning="Clients with an open stream to a server that answers.",
        of=lambda stats, options: stats.connected,
    ),
    Reading(
        name="staleness_steps",
        meaning="Steps made since the newest answer; the most of all clients.",
        of=lambda stats, options: stats.staleness,
        together=max,
    ),
    Reading(
        name="max_staleness_steps",
        meaning="Beyond so many, weights are uniform: max_staleness.",
        of=lambda stats, options: options.max_staleness,
        together=min,
    ),
    Reading(
        name="unacked_steps",
        meaning="Steps that wait for their answer; the most of all clients.",
        of=lambda stats, options: stats.unacked,
        together=max,
    ),
    Reading(
        name="window_steps",
        meaning="Steps kept because they are not durable yet; the most of all clients.",
        of=lambda stats, options: stats.undurable,
        together=max,
    ),
    Reading(
        name="window_steps_limit",
        meaning="The most that a client keeps: limits.window_steps.",
        of=lambda stats, options: options.limits.window_steps,
        together=min,
    ),
)


@dataclass(slots=True)
class _Known:
    """A client as it was last seen."""

    client: weakref.ref[Client]
    options: SessionOptions
    stats: Stats

    def look(self) -> bool:
        """Sees it again; whether it is still there."""
        client = self.client()
        if client is not None:
            self.stats = client.stats
        return client is not None


class Clients:
    """The clients of this process. Thread-safe; a forked child begins with none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begin()

    def joined(self, client: Client, options: SessionOptions) -> None:
        """A client was made."""
        with self._lock:
            self._follow_fork()
            self._known[id(client)] = _Known(weakref.ref(client), options, Stats())
            self._past.setdefault(options.spec.name, dict.fromkeys((each.name for each in COUNTERS), 0.0))

    def left(self, client: Client) -> None:
        """A client was closed: its counts stay."""
        stats = client.stats
        with self._lock:
            self._follow_fork()
            if (known := self._known.pop(id(client), None)) is not None:
                known.stats = stats
                self._bury(known)

    def read(self, readings: Iterable[Reading]) -> Mapping[str, Mapping[str, float]]:
        """By name and policy; a gauge only where there are clients."""
        with self._lock:
            self._follow_fork()
            known = dict(self._known)
        gone = [key for key, each in known.items() if not each.look()]  # beyond the lock: it takes the client's
        with self._lock:
            for key in gone:
                if self._known.pop(key, None) is known[key]:
                    self._bury(known.pop(key))
            return {reading.name: self._together(reading, known.values()) for reading in readings}

    def _together(self, reading: Reading, known: Iterable[_Known]) -> Mapping[str, float]:
        values: dict[str, list[float]] = {}
        if reading in COUNTERS:
            values = {policy: [past[reading.name]] for policy, past in self._past.items()}
        for each in known:
            values.setdefault(each.options.spec.name, []).append(float(reading.of(each.stats, each.options)))
        return {policy: reading.together(found) for policy, found in values.items()}

    def _bury(self, known: _Known) -> None:
        past = self._past[known.options.spec.name]
        for reading in COUNTERS:
            past[reading.name] += reading.of(known.stats, known.options)

    def _follow_fork(self) -> None:
        if self._pid != os.getpid():
            self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._known: dict[int, _Known] = {}
        self._past: dict[str, dict[str, float]] = {}
