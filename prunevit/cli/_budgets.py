"""What ``prunevit prune`` is asked for, checked without loading torch: constraints and methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import typer

from .._units import read_amount

METHODS = ("auto", "cp-vit", "evit", "gohsp", "magnitude", "random", "snp", "taylor")
KINDS = ("head", "qk", "v", "mlp", "channel", "read", "sublayer")
LOOKS_AT_IMAGES = ("auto", "cp-vit", "gohsp", "snp", "taylor")

Constraints = dict[str, str | float]


def constraints_of(given: Mapping[str, str | None], methods: Sequence[str]) -> Constraints | list[Constraints]:
    """The constraints by name; or one mapping for each method, where an option has a list such as 80%,50%."""
    texts = {name: text.split(",") for name, text in given.items() if text is not None}
    counts = {len(parts) for parts in texts.values()} - {1}
    for name, parts in texts.items():
        if len(parts) not in (1, len(methods)):
            what = f"expected one value, or one for each of {len(methods)} methods, got {len(parts)}"
            raise typer.BadParameter(what, param_hint=f"--{name}")
    each = [
        {name: constraint(name, parts[at] if len(parts) > 1 else parts[0]) for name, parts in texts.items()}
        for at in range(max(counts, default=1))
    ]
    return each if counts else each[0]


def constraint(name: str, text: str) -> str | float:
    """ "45%" stays a share; "2.0G", "20ms" or "50MB" becomes a number, of counts, milliseconds or bytes."""
    try:
        amount, share = read_amount(name, text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=f"--{name}") from None
    return f"{100 * amount:g}%" if share else amount


def names_of(methods: Sequence[str]) -> set[str]:
    """Without the kinds of group that they take: "auto:mlp" is auto."""
    return {method.partition(":")[0] for method in methods}


def methods_of(texts: Sequence[str]) -> list[str]:
    """Methods in order, from options given several times or lists: "snp,taylor:head,mlp" are two."""
    made: list[str] = []
    for word in (word.strip() for text in texts for word in text.split(",") if word.strip()):
        name, colon, kind = word.partition(":")
        if not colon and name in KINDS and made and ":" in made[-1]:
            made[-1] += f",{name}"
            continue
        if name not in METHODS:
            hint = f": say who scores it, such as taylor:{name}" if name in KINDS else ""
            raise typer.BadParameter(
                f"expected a method out of {', '.join(METHODS)}, got {name!r}{hint}", param_hint="--method"
            )
        if colon and kind not in KINDS:
            raise typer.BadParameter(
                f"expected kinds of group out of {', '.join(KINDS)}, got {kind!r}", param_hint="--method"
            )
        made.append(word)
    if not made:
        raise typer.BadParameter(f"expected a method out of {', '.join(METHODS)}, got none", param_hint="--method")
    return made
