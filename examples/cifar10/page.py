"""The tables of docs/methods.md, between their markers."""

from __future__ import annotations

from collections.abc import Callable

import tables
from claims import claims

TABLES: dict[str, Callable[[tables.Results], str]] = {
    "cifar10-setup": tables.setup,
    "cifar10-main": tables.main_point,
    "cifar10-budgets": tables.budgets,
    "cifar10-cut": tables.untrained,
    "cifar10-kinds": tables.one_kind,
    "cifar10-maps": tables.maps,
    "cifar10-agreement": tables.agreement,
    "cifar10-auto": tables.auto,
    "cifar10-claims": claims,
}


def fill(page: str, results: tables.Results) -> str:
    """A page with each table between its markers made anew."""
    for name, render in TABLES.items():
        start, end = f"<!-- table: {name} -->\n", "<!-- end -->"
        if start not in page:
            continue
        before, rest = page.split(start, 1)
        _, after = rest.split(end, 1)
        page = f"{before}{start}{render(results)}\n{end}{after}"
    return page
