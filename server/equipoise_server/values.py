"""Values that each step makes anew: dataclasses that are frozen for the type checker alone."""

from dataclasses import dataclass
from typing import TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def value(cls: type[T]) -> type[T]:
    """`dataclass(frozen=True, slots=True, kw_only=True)`, but nothing stops a change at run time.

    A frozen one sets each of its fields through `object.__setattr__`, which takes four to six times as long.
    """
    return dataclass(slots=True, kw_only=True)(cls)
