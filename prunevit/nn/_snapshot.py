"""What a module tree is made of, so that what was found out about it once is known until somebody changes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, repeat
from operator import is_not
from typing import Any, Generic, TypeVar

from torch import nn

from ..models.parts import kind_of, methods_of

T = TypeVar("T")
KNOWN = "_known"  # where a module keeps what was found out about it


class Snapshot:
    """Every module's type, children, attributes and buffers, and which parameters are there; no parameter's values.

    It holds neither the root nor the root's own dictionary, so that a root that keeps it is freed as soon as it goes.
    ``holds`` is asked at every call, so it walks the others' with C's loops alone.
    """

    def __init__(self, root: nn.Module) -> None:
        modules = list(root.modules())
        self._parts = modules[1:]
        self._types = [type(root), *map(type, self._parts)]
        self._methods = [method for kind in {kind_of(m) for m in modules} for method in methods_of(kind)]
        self._own = _attributes(root)
        self._dicts: list[dict[str, Any]] = [m.__dict__ for m in self._parts]
        self._dicts += [m._modules for m in modules]
        self._dicts += [m._buffers for m in modules if m._buffers]
        self._lengths, self._values = list(map(len, self._dicts)), list(_values(self._dicts))
        # the only attributes of these modules that change in place
        self._lists = [value for m in modules for value in list(m.__dict__.values()) if type(value) is list]
        self._copies = [value.copy() for value in self._lists]
        owned = [(name, module) for name, module in root.named_modules() if module._parameters]
        self._owners: list[dict[str, Any]] = [module._parameters for _, module in owned]
        self._keys = list(chain.from_iterable(self._owners))
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

    def holds(self, root: nn.Module) -> bool:
        """Is the tree as it was? Attributes are compared by identity: a new object is a change, equal or not."""
        own = _attributes(root)
        return (
            self.hooked == self._hooked
            and len(own) == len(self._own)
            and not any(map(is_not, own, self._own))
            and all(getattr(kind, name) is method for kind, name, method in self._methods)
            and list(map(len, self._dicts)) == self._lengths
            and not any(map(is_not, _values(self._dicts), self._values))
            and [type(root), *map(type, self._parts)] == self._types
            # a parameter deleted and set again comes last
            and list(chain.from_iterable(self._owners)) == self._keys
            and list(map(is_not, _values(self._owners), repeat(None))) == self._present
            and self._lists == self._copies
        )


def _values(dicts: list[dict[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(dict.values, dicts))


def _attributes(root: nn.Module) -> list[Any]:
    return [value for name, value in root.__dict__.items() if name != KNOWN]


class _Kept(dict["Known[Any]", tuple[Snapshot, Any]]):
    """What is known of one module, kept on it: filed elsewhere, it would keep alive a module that refers to itself.

    A copy of the module finds out for itself.
    """

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return _Kept, ()


class Known(Generic[T]):
    """What ``look(module, snapshot)`` finds, looked for again when the module's tree has changed."""

    def __init__(self, look: Callable[[Any, Snapshot], T]) -> None:
        self._look = look

    def __call__(self, module: nn.Module) -> tuple[Snapshot, T]:
        kept = module.__dict__.get(KNOWN)
        if kept is None:
            kept = module.__dict__[KNOWN] = _Kept()
        found: tuple[Snapshot, T] | None = kept.get(self)
        if found is None or not found[0].holds(module):
            # the snapshot comes first: a change in between makes it old, not wrong
            snapshot = Snapshot(module)
            found = kept[self] = snapshot, self._look(module, snapshot)
        return found
