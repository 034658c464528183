"""What spec and plan have in common: frozen pydantic models, read from untrusted files, whose errors name the field."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import PrunevitError, SpecError

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)

MAX_FIELDS = 64  # no object of a spec or a plan has as many


class _Named(ModelMetaclass):
    """Its classes raise their own ``error`` where they are called; pydantic, which builds the parts, calls none."""

    def __call__(self, *args: Any, **fields: Any) -> Any:
        with named(self):
            return super().__call__(*args, **fields)


class Frozen(BaseModel, metaclass=_Named):
    """``kind`` is what messages call it, ``error`` what it raises."""

    # strict: a JSON true is no width of 1, and "12" no depth; lax_size etc. would hide a malformed file
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    kind: ClassVar[str] = "part of a spec"
    error: ClassVar[type[PrunevitError]] = SpecError


class Document(Frozen):
    """A model that files hold whole."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read untrusted data. Raises its ``error`` with the path of each wrong field and why."""
        try:
            most = _most_fields(data)
            # lists stand for tuples in JSON: validated as JSON, strictness keeps its meaning for everything else
            text = json.dumps(data)
        except (TypeError, ValueError, RecursionError) as error:
            raise cls.error(f"invalid {cls.kind}: expected plain JSON values, got {error}") from None
        if most > MAX_FIELDS:  # each unknown one would be an error, of a kilobyte
            raise cls.error(f"invalid {cls.kind}: expected at most {MAX_FIELDS} fields an object, got {most}")
        with named(cls):
            return cls.model_validate_json(text)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, defaults included."""
        data: dict[str, Any] = self.model_dump(mode="json")
        return data


@contextmanager
def named(cls: Any) -> Iterator[None]:
    """What is wrong with a document or a part of one, as the error that it names, with the path of each field."""
    try:
        yield
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or cls.kind}: {_reason(e)}" for e in error.errors()[:5]]
        raise cls.error(f"invalid {cls.kind}: " + "; ".join(lines)) from None


def _most_fields(data: Any) -> int:
    """The most fields that an object has; lists are looked into where they begin with one."""
    if isinstance(data, Mapping):
        return max(len(data), *map(_most_fields, data.values()), 0)
    return max(map(_most_fields, data)) if isinstance(data, list | tuple) and data and isinstance(data[0], dict) else 0


def _reason(error: Any) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    value = repr(error["input"])
    shown = value if len(value) <= 60 else value[:57] + "…"
    return message if error["type"] == "value_error" else f"{message}, got {shown}"
