"""Run the cells of the grid that are missing: ``python examples/cifar10/run.py --data DIR --out DIR``.

Interrupt it whenever you like. The same command goes on: a training run from its last epoch, the grid from its last
cell. Nothing is measured twice.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from grid import Grid, cells
from images import open_images
from journal import Journal
from setting import Setting
from tqdm import tqdm

from prunevit.machine import cpu_name


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    setting = Setting(**{field.name: getattr(options, field.name) for field in fields(Setting)})
    journal = Journal(options.out / "journal.jsonl", {"setting": setting.to_dict(), "environment": environment()})
    wanted = list(cells(setting))
    missing = [cell for cell in wanted if cell not in journal]
    if options.stages:
        missing = [cell for cell in missing if cell["stage"] in options.stages]
    if not options.list and missing:
        grid = Grid(setting, dict(open_images(options.data, options.out)), options.out, journal)
        for cell in tqdm(missing[: options.most], "cells"):
            grid.run(cell)
            tqdm.write(summary(cell, journal.facts(cell)))
    left = [cell for cell in wanted if cell not in journal]
    if options.json:
        print(json.dumps({"cells": len(wanted), "missing": left}))
    else:
        for cell in left if options.list else []:
            print("missing: " + " ".join(str(value) for value in cell.values()))
        print(f"{len(wanted) - len(left)} of {len(wanted)} cells measured; now: report.py --out {options.out}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="a folder of train/CLASS and test/CLASS, or an archive"
    )
    parser.add_argument("--out", type=Path, required=True, help="where the journal, models and states go")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stages", nargs="+", help="only cells of these: dense, recovered, cut, 'one kind', …")
    parser.add_argument("--most", type=int, help="stop after so many cells")
    parser.add_argument("--list", action="store_true", help="say which cells are missing, and run none")
    parser.add_argument("--json", action="store_true", help="say what is missing as JSON")
    numbers = parser.add_argument_group("setting", "a journal belongs to one setting")
    for field in fields(Setting):
        default: Any = field.default
        many = isinstance(default, tuple)
        kind = type(default[0] if many else default)
        numbers.add_argument(
            f"--{field.name.replace('_', '-')}", type=kind, default=default, nargs="+" if many else None
        )
    options = parser.parse_args()
    for field in fields(Setting):
        if isinstance(field.default, tuple):
            setattr(options, field.name, tuple(getattr(options, field.name)))
    return options


def environment() -> dict[str, Any]:
    packages = {name: version(name) for name in ("prunevit", "torch", "timm")}
    return {"cpu": cpu_name(), "threads": torch.get_num_threads(), "python": platform.python_version(), **packages}


def summary(cell: dict[str, Any], facts: dict[str, Any]) -> str:
    found = [f"{name} {facts[name]:.3g}" for name in ("macs_share", "map_error", "spearman") if name in facts]
    found += [f"{name} {facts[name]:.1%}" for name in ("cut", "accuracy") if name in facts]
    return " ".join(str(value) for value in cell.values()) + ": " + (", ".join(found) or "unreachable")


if __name__ == "__main__":
    main()
