"""The device thread: the one place where tables are read and changed."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from time import perf_counter
from typing import TypeVar

import torch

from equipoise_server.errors import device_lost
from equipoise_server.rules import Slices

T = TypeVar("T")

SLICE_S = 0.005
"""How long one piece of long work holds the device, seconds, unless it is indivisible."""


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


class DeviceThread:
    """Runs calls on the tables one after another, off the event loop.

    A call that is known to be short runs on the event loop itself while the thread has nothing to do and the device is
    the CPU: the two changes of thread cost more than a step of some thousand rows.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")
        self._pending = 0

    async def run(self, call: Callable[[], T], *, short: bool = False) -> T:
        """The call's result. Called on one event loop only.

        Raises ServiceError (DEVICE_LOST) when the device fails: what the call changed is not to be trusted.
        """
        try:
            return await self._run(call, short=short)
        except RuntimeError as error:
            if is_device_fault(error):
                raise device_lost(str(error).partition("\n")[0]) from error
            raise

    async def run_slices(self, slices: Slices[T]) -> T:
        """The result of long work, of which other calls wait for one piece at most. Errors as for `run`."""
        try:
            while True:
                results = await self.run(lambda: _advance(slices))
                if results:
                    return results[0]
        finally:  # behind the piece that a cancelled caller has left
            with suppress(RuntimeError):  # the thread has ended
                self._executor.submit(slices.close)

    def close(self) -> None:
        """Ends the thread after the calls that were already given."""
        self._executor.shutdown(wait=True)

    async def _run(self, call: Callable[[], T], *, short: bool) -> T:
        if short and self._pending == 0 and self.device.type == "cpu":
            return call()
        self._pending += 1
        running = asyncio.get_running_loop().run_in_executor(self._executor, call)
        running.add_done_callback(self._ended)
        return await asyncio.shield(running)  # a caller that is cancelled does not end the call

    def _ended(self, _: object) -> None:
        self._pending -= 1


def _advance(slices: Slices[T]) -> tuple[T, ...]:
    """Works for one piece; the result once there is one, else nothing."""
    end = perf_counter() + SLICE_S
    while perf_counter() < end:
        try:
            next(slices)
        except StopIteration as ended:
            return (ended.value,)
    return ()
