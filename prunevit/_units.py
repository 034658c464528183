"""Numbers with units: what people write for how much may remain, and how one is shown. Without torch."""

from __future__ import annotations

import re

COUNTS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
MILLISECONDS = {"": 1.0, "us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}
BYTES = {"": 1.0, "B": 1.0} | {
    f"{prefix}{unit}": (1000.0 if unit == "B" else 1024.0) ** power
    for power, prefix in enumerate("KMGT", start=1)
    for unit in ("B", "iB")
}
UNITS = {"latency": MILLISECONDS, "memory": BYTES}
"""By constraint; others are counts. Numbers without a unit are milliseconds and bytes."""
SYMBOLS = {"latency": " ms", "memory": " B"}
"""What is shown after a number without a unit."""
EXAMPLES = {"latency": "20ms", "memory": "50MB"}

_AMOUNT = re.compile(r"\s*(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)\s*(%|[a-zA-Zµ]*)\s*")


def si(number: float, unit: str = "") -> str:
    """2_037_000_000 as "2.04 G"."""
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {prefix}{unit}"
    return f"{number:.0f} {unit}".rstrip()


def read_amount(name: str, text: str) -> tuple[float, bool]:
    """What ``text`` means for the constraint ``name``: a number, and whether it is a share of dense (1.0 is all).

    Raises ValueError, with what was expected.
    """
    found = _AMOUNT.fullmatch(text)
    units = {unit.lower(): scale for unit, scale in UNITS.get(name, COUNTS).items()}
    unit = "" if found is None else found[2].lower()
    if found is not None and unit == "%":
        if not 0 < float(found[1]) <= 100:
            raise ValueError(f"{name}: expected a share between 0% and 100% of dense, got {text!r}")
        return float(found[1]) / 100, True
    if found is None or float(found[1]) == 0 or unit not in units:
        example = EXAMPLES.get(name, "2.0G")
        raise ValueError(f'{name}: expected a share such as "45%" or a number such as "{example}", got {text!r}')
    return float(found[1]) * units[unit], False
