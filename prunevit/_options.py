"""Options by name, as they come from a command line or a file: each is of its field's type, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from .errors import PrunevitError, PruningError, expect


def expect_at_least(options: object, name: str, least: int) -> None:
    """Raise :class:`PruningError` where a field is below ``least``; None is whatever None means there."""
    value = getattr(options, name)
    expect(value is None or value >= least, PruningError, f"{name} of at least {least}", got=value)


def check_types(kind: type[Any], options: Mapping[str, Any], error: type[PrunevitError] = PruningError) -> None:
    """Raise ``error`` unless each option fits the field of that name of ``kind``, a dataclass.

    Words inside of something (kinds of group in a list) are left to the class, which says what they may be.
    """
    hints, names = get_type_hints(kind), {field.name: field.type for field in fields(kind)}
    for name, value in options.items():
        hint = hints[name]
        literal = get_origin(hint) is Literal
        if not literal and "Literal[" in str(hint):
            continue
        try:
            # strict, for the value is used as it came: "False" would be true
            TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True, strict=True)).validate_python(value)
            fits = True
        except ValidationError:
            fits = False
        what = f"out of {', '.join(map(str, get_args(hint)))}" if literal else f"to be {names[name]}"
        expect(fits, error, f"{name} {what}", got=repr(value))
