"""A client whose part in a training can be looked at."""

from typing import Any

import numpy as np

from equipoise import PolicyClient


class Recording(PolicyClient):
    """A client that notes what is sent, and asks and waits, so that timing makes no difference."""

    sent: list[tuple[list[int], dict[str, Any]]]
    asked: list[tuple[list[int], dict[str, Any], Any]]
    known: Any

    def weights(self, ids: Any) -> Any:
        return self.read(ids).weights

    def submit(self, ids: Any = None, **fields: Any) -> None:
        self.__dict__.setdefault("sent", []).append((np.asarray(ids).tolist(), dict(fields)))
        super().submit(ids, **fields)
        assert self.flush(30)

    def step(self, ids: Any = None, **fields: Any) -> Any:
        result = super().step(ids, **fields)
        self.__dict__.setdefault("asked", []).append((np.asarray(ids).tolist(), dict(fields), result.weights))
        return result
