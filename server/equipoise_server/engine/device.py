"""The device: the one place where tables are read and changed, shared by all policies."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Generic, TypeVar

import torch

from equipoise_server.engine.turns import Turns
from equipoise_server.errors import device_lost
from equipoise_server.rules import Slices

T = TypeVar("T")

SLICE_S = 0.005
"""How long one piece of work holds a lane, seconds, unless it is indivisible; also the quantum of a turn."""


def choose_device(name: str) -> torch.device:
    """The device for `auto`, `cpu` or `cuda`. Raises ValueError when it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch sees no CUDA device; use 'auto' or 'cpu'")
    return torch.device(name)


def describe_device(device: torch.device) -> str:
    """Name of a device for people."""
    return f"cuda:0 ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


_DEVICE_FAULTS = tuple(
    getattr(torch, name) for name in ("AcceleratorError", "OutOfMemoryError") if hasattr(torch, name)
)


def is_device_fault(error: BaseException) -> bool:
    """Whether an error is the device's: lost, out of memory, or in a state from which nothing works any more."""
    return isinstance(error, _DEVICE_FAULTS) or (isinstance(error, RuntimeError) and "CUDA" in str(error))


class _Common(threading.Condition):
    """The lock of a device's lanes and queues, and what they know together."""

    def __init__(self) -> None:
        super().__init__(threading.Lock())
        self.unfinished = 0
        """Calls that wait or run."""
        self.closed = False


@dataclass(slots=True)
class _Call(Generic[T]):
    """Work for the device, and where its result goes."""

    work: Callable[[], T]
    result: "asyncio.Future[T]"
    lane: "_Lane"


class Device:
    """Runs work on the tables off the event loop, the work of one policy in order and one piece at a time.

    It has two lanes, each a thread: one for work of some milliseconds at most, one for single pieces that take longer
    and cannot be divided, such as a step that changes ten million rows. So short work never waits for long work. What
    is done on a GPU, where ten million rows take a millisecond or two, is all short. In a lane the shares take turns.

    Args:
        device: where the tables are.
        share: by the name of a policy, to whose share of the device it belongs, such as a tenant's; by default every
            policy has a share of its own.
    """

    def __init__(self, device: torch.device, *, share: Callable[[str], str] = str) -> None:
        self.device = device
        self._share = share
        self._common = _Common()
        self._short = _Lane("device", self._common)
        self._long = _Lane("device-long", self._common)

    def queue(self, policy: str) -> "DeviceQueue":
        """A queue for the work on one policy. Called on one event loop only."""
        long = self._short if self.device.type == "cuda" else self._long
        return DeviceQueue(self.device, self._share(policy), self._common, short=self._short, long=long)

    def host_queue(self, policy: str) -> "DeviceQueue":
        """A queue for long work that touches no table, such as the reading of large requests."""
        return DeviceQueue(torch.device("cpu"), self._share(policy), self._common, short=self._short, long=self._long)

    def close(self) -> None:
        """Ends the lanes after the work that was already given."""
        with self._common:
            self._common.closed = True
            self._common.notify_all()
        for lane in (self._short, self._long):
            lane.join()


class DeviceQueue:
    """A policy's work on the device, in order, one piece at a time; made by `Device.queue`, for one event loop.

    Work that is known to be very short runs on the event loop itself while the short lane has nothing to do and the
    device is the CPU: the two changes of thread cost more than a step of some thousand rows.
    """

    def __init__(self, device: torch.device, share: str, common: _Common, *, short: "_Lane", long: "_Lane") -> None:
        self.device = device
        self.share = share
        self._common = common
        self._short = short
        self._long = long
        self._calls: deque[_Call[Any]] = deque()
        self._busy = False
        """Whether it waits for a lane, or is in one."""

    async def run(self, work: Callable[[], T], *, inline: bool = False, long: bool = False) -> T:
        """The work's result; a caller that is cancelled does not end it.

        Args:
            work: what to do.
            inline: it may run on the event loop.
            long: it may take longer than SLICE_S, in one piece.

        Raises ServiceError (DEVICE_LOST) when the device fails: what the work changed is not to be trusted.
        """
        try:
            if inline and self._free():
                return work()
            return await asyncio.shield(self._submit(work, self._long if long else self._short))
        except RuntimeError as error:
            if is_device_fault(error):
                raise device_lost(str(error).partition("\n")[0]) from error
            raise

    async def run_slices(self, slices: Slices[T]) -> T:
        """The result of work in slices, of which other work waits for some SLICE_S at most. Errors as for `run`."""
        try:
            while True:
                results = await self.run(lambda: _advance(slices))
                if results:
                    return results[0]
        finally:  # behind the piece that a cancelled caller has left
            with suppress(RuntimeError):  # the lanes have ended
                self._submit(slices.close, self._short)

    def _free(self) -> bool:
        """Whether nothing is waiting that work on the event loop would overtake."""
        return self.device.type == "cpu" and not self._busy and self._short.idle

    def _submit(self, work: Callable[[], T], lane: "_Lane") -> "asyncio.Future[T]":
        call = _Call(work, asyncio.get_running_loop().create_future(), lane)
        with self._common:
            if self._common.closed:
                raise RuntimeError("the device is closed")
            self._common.unfinished += 1
            self._calls.append(call)
            if not self._busy:
                self.offer()
        return call.result

    def offer(self) -> None:
        """Stands in line for the lane of its first call; with the lock."""
        self._busy = bool(self._calls)
        if self._busy:
            self._calls[0].lane.add(self)

    def take(self) -> _Call[Any]:
        """The call whose turn it is; nobody else takes one until the next `offer`."""
        return self._calls.popleft()


class _Lane:
    """A thread that works for one queue after another.

    Args:
        name: of the thread.
        common: of the device.
    """

    def __init__(self, name: str, common: _Common) -> None:
        self._common = common
        self._turns: Turns[DeviceQueue] = Turns(SLICE_S)
        self._working = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        return not self._working and not self._turns

    def add(self, queue: DeviceQueue) -> None:
        """A queue whose next call is for this lane; with the lock."""
        self._turns.add(queue.share, queue)
        self._common.notify_all()

    def join(self) -> None:
        """Returns when the thread has ended."""
        self._thread.join()

    def _run(self) -> None:
        while (queue := self._next()) is not None:
            self._work(queue, queue.take())

    def _next(self) -> DeviceQueue | None:
        """The queue whose turn it is; None: there will be no more."""
        with self._common:
            self._working = False
            while not self._turns:
                if self._common.closed and not self._common.unfinished:
                    return None
                self._common.wait()
            self._working = True
            return self._turns.take()

    def _work(self, queue: DeviceQueue, call: _Call[Any]) -> None:
        started = perf_counter()
        settle: Callable[..., None] = asyncio.Future.set_result
        value: object
        try:
            value = call.work()
        except BaseException as error:
            settle, value = asyncio.Future.set_exception, error
        with self._common:
            self._turns.charge(queue.share, perf_counter() - started)
            self._common.unfinished -= 1
            queue.offer()
            if self._common.closed:
                self._common.notify_all()
        with suppress(RuntimeError):  # the loop has ended
            call.result.get_loop().call_soon_threadsafe(_settle, call.result, settle, value)


def _settle(result: "asyncio.Future[Any]", settle: Callable[..., None], value: object) -> None:
    if not result.done():
        settle(result, value)


def _advance(slices: Slices[T]) -> tuple[T, ...]:
    """Works for one piece; the result once there is one, else nothing."""
    end = perf_counter() + SLICE_S
    while perf_counter() < end:
        try:
            next(slices)
        except StopIteration as ended:
            return (ended.value,)
    return ()
