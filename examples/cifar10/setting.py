"""What is measured, in numbers: the model, the schedules and the grid. It stands beside the results."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """The defaults fit the background of two CPU cores. Every field is an option of `run.py`."""

    # the dense model
    image: int = 32
    patch: int = 4
    width: int = 128
    depth: int = 6
    heads: int = 4
    small_width: int = 88  # of a dense model with about half of the MACs
    # its training; half of the patches are dropped there, and none from then on
    epochs: int = 8
    batch: int = 128
    lr: float = 1e-3
    patch_drop: float = 0.5
    compiled: int = 1
    # recovery: as many optimiser steps for every method, those inside the method included
    steps: int = 200
    recovery_lr: float = 5e-4
    gohsp_stages: int = 3
    gohsp_stage_steps: int = 33
    gohsp_rho: float = 1e-2
    rounds: int = 4  # of iterative pruning at one uniform ratio
    auto_tau: float = 0.05
    auto_images: int = 500  # of the validation split
    auto_round_steps: int = 25  # after each committed round, where auto is iterative
    # the grid
    main: float = 0.5  # of the dense MACs
    others: tuple[float, ...] = (0.7, 0.35)
    claimed_params: float = 0.6  # of the dense parameters: GOHSP's claim on CIFAR-10
    cuts: tuple[float, ...] = (0.9, 0.8, 0.7, 0.6, 0.5, 0.35)
    ratios: tuple[float, ...] = (0.25, 0.5, 0.75)  # of one kind of unit that goes
    seeds: int = 3
    calibration: int = 256
    test: int = 5000
    probed: int = 2000  # of the test images, for what is not trained

    def to_dict(self) -> dict[str, Any]:
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
