"""A bound on short waits that follow each other, such as each message's: one timer serves many of them."""

import asyncio
from types import TracebackType


class Patience:
    """Surrounds what one task at a time waits for, again and again: `with patience: await ...`

    As asyncio.timeout, but its timer is set once and looks again, as seldom as the waits allow; setting and cancelling
    one for each message is what a message of a few rows would notice.

    Args:
        seconds: longest wait.

    Raises TimeoutError when a wait takes longer; it is cancelled, as with asyncio.timeout.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._task: asyncio.Task[object] | None = None
        """Who waits now."""
        self._cancelling = 0
        self._deadline = 0.0
        self._expired = False
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> None:
        assert self._task is None, "one wait at a time"
        loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        assert self._task is not None
        self._cancelling = self._task.cancelling()
        self._deadline = loop.time() + self._seconds
        if self._timer is None:
            self._timer = loop.call_at(self._deadline, self._look, loop)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        if self._expired:
            self._expired = False
            assert task is not None
            if task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
                raise TimeoutError from error

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if self._task is None or self._expired:
            return
        if loop.time() < self._deadline:  # a later wait's
            self._timer = loop.call_at(self._deadline, self._look, loop)
        else:
            self._expired = True
            self._task.cancel()
