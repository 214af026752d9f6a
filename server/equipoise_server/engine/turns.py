"""Whose turn it is: those who share one worker take turns by the time they have used."""

from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """Deficit round robin (Shreedhar and Varghese, SIGCOMM 1995) by time, where a cost is known afterwards only.

    A share is somebody who is owed as much of the worker as anybody else. Its turn lasts a quantum; who took longer
    lets as many rounds go by; who has nothing to do saves nothing up.

    Args:
        quantum_s: time of one turn, seconds.
    """

    def __init__(self, quantum_s: float) -> None:
        self._quantum_s = quantum_s
        self._waiting: dict[Hashable, deque[T]] = {}
        self._round: deque[Hashable] = deque()
        self._credit: dict[Hashable, float] = {}
        """Seconds left of a share's turn; negative: owed to the others. Without an entry: a whole turn."""

    def __len__(self) -> int:
        """How many shares have something waiting."""
        return len(self._round)

    def add(self, share: Hashable, item: T) -> None:
        """Something to do for a share; items of one share are taken in the order of their coming."""
        if share not in self._waiting:
            self._waiting[share] = deque()
            self._round.append(share)
        self._waiting[share].append(item)

    def take(self) -> T:
        """The next item. Raises IndexError when nothing waits."""
        while (left := self._credit.get(share := self._round[0], self._quantum_s)) <= 0:
            self._credit[share] = left + self._quantum_s
            self._round.rotate(-1)
        item = self._waiting[share].popleft()
        if not self._waiting[share]:
            self._round.popleft()
            del self._waiting[share]
        return item

    def charge(self, share: Hashable, seconds: float) -> None:
        """The time that an item of a share took."""
        left = self._credit.get(share, self._quantum_s) - seconds
        if not self._round:  # nobody waited for it
            self._credit.clear()
        elif share in self._waiting or left <= 0:
            self._credit[share] = left
        else:
            self._credit.pop(share, None)
