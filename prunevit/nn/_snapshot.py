"""What a module tree is made of, so that what was found out about it once is known until somebody changes it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from operator import is_not
from typing import Any, Generic, TypeVar

from torch import nn

T = TypeVar("T")


class Snapshot:
    """Every module's type, children and attributes, and which parameters are there. Tensors' values are not part of it.

    It holds dictionaries, not the root itself: it does not keep a module alive that it is filed under. ``holds`` is
    asked at every call, so it walks them with C's loops alone.
    """

    def __init__(self, root: nn.Module) -> None:
        modules = list(root.modules())
        self._dicts: list[dict[str, Any]] = [d for m in modules for d in (m.__dict__, m._modules)]
        self._lengths, self._values = list(map(len, self._dicts)), list(_values(self._dicts))
        self._parts = modules[1:]
        self._types = list(map(type, self._parts))
        # the only attributes of these modules that change in place
        self._lists = [value for m in modules for value in m.__dict__.values() if type(value) is list]
        self._copies = [value.copy() for value in self._lists]
        owned = [(name, module) for name, module in root.named_modules() if module._parameters]
        self._owners: list[dict[str, Any]] = [module._parameters for _, module in owned]
        self._present = list(map(is_not, _values(self._owners), repeat(None)))
        self.names = [
            f"{name}.{key}" if name else key
            for name, module in owned
            for key, parameter in module._parameters.items()
            if parameter is not None
        ]
        self._hooks = [hooks for m in self._parts for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooked = self.hooked

    @property
    def hooked(self) -> bool:
        """Does anybody listen to a module inside?"""
        return any(self._hooks)

    def parameters(self) -> tuple[Any, ...]:
        """What the names name now."""
        return tuple(parameter for parameter in _values(self._owners) if parameter is not None)

    def holds(self) -> bool:
        """Is the tree as it was? Attributes are compared by identity: a new object is a change, equal or not."""
        return (
            self.hooked == self._hooked
            and list(map(len, self._dicts)) == self._lengths
            and not any(map(is_not, _values(self._dicts), self._values))
            and list(map(type, self._parts)) == self._types
            and list(map(is_not, _values(self._owners), repeat(None))) == self._present
            and self._lists == self._copies
        )


def _values(dicts: list[dict[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(dict.values, dicts))


class Known(Generic[T]):
    """What ``look(module)`` finds, looked for again when the module's tree has changed."""

    def __init__(self, look: Callable[[Any], T]) -> None:
        self._look = look
        self._found: weakref.WeakKeyDictionary[nn.Module, tuple[Snapshot, T]] = weakref.WeakKeyDictionary()

    def __call__(self, module: nn.Module) -> tuple[Snapshot, T]:
        found = self._found.get(module)
        if found is not None and found[0].holds():
            return found
        # the snapshot comes first: a change in between makes it old, not wrong
        found = self._found[module] = Snapshot(module), self._look(module)
        return found
