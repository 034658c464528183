"""Which backend, device and dtype a runtime gets; nothing is chosen in silence."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Literal

import torch

from prunevit_kernels import BACKENDS, BackendName, ContractError, MissingExtension, Target
from prunevit_kernels.cpu import extension
from prunevit_kernels.target import BUILD_COMMAND, HALF, available_cores, cpu_extension_built

from ..errors import CheckpointError, InputError, UntunedMachine, expect

logger = logging.getLogger("prunevit")

BUILD = f"`{BUILD_COMMAND}` in a source checkout, or reinstall prunevit where there is a C++ compiler"


def choose_target(
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    backend: BackendName | Literal["auto"],
    threads: int | None,
) -> Target:
    """What a runtime was asked for, with the rest filled in: a GPU where there is one, else the CPU's own kernels.

    ``auto`` takes ``torch`` only for a device or dtype that no kernel serves, or, with a warning that has the command
    that builds it, where the native extension is missing. Raises :class:`InputError` for what cannot be had here.
    """
    expect(backend in ("auto", *BACKENDS), InputError, f"a backend among auto, {', '.join(BACKENDS)}", got=backend)
    threads = available_cores() if threads is None else count(threads, "threads")
    floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    expect(dtype is None or floating, InputError, "a floating torch.dtype such as torch.float32", got=dtype)
    if device is None:
        wants_gpu = backend == "cuda" or (backend in ("auto", "torch") and torch.cuda.is_available())
        device = "cuda" if wants_gpu else "cpu"
    device = device_named(device)
    if device.type == "cuda":
        expect(torch.cuda.is_available(), InputError, "an NVIDIA GPU for device cuda", got="none that torch sees")
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    chosen = _automatic(device, dtype) if backend == "auto" else backend
    if dtype is None:
        dtype = torch.bfloat16 if chosen == "cuda" else torch.float32
    try:
        native = extension() if chosen == "cpu" else None
    except MissingExtension:
        raise InputError(f"expected the C++ kernels for backend cpu, got none built: build them with {BUILD}") from None
    try:
        target = Target(chosen, device, dtype, threads)
        if native is not None:
            native.isa()  # one that this machine has not, and a pool that is too large, are said here by name
            _ = target.pool
    except (ValueError, getattr(native, "IsaError", ValueError)) as error:
        raise InputError(str(error)) from None
    logger.info("backend %s on %s in %s", chosen, device, str(dtype).removeprefix("torch."))
    return target


def is_count(number: object) -> bool:
    """A whole number of something, at least one."""
    return isinstance(number, Integral) and not isinstance(number, bool) and int(number) >= 1


def count(number: object, name: str) -> int:
    """The number, if it is a count, NumPy's too; else an :class:`InputError` that says of what."""
    expect(is_count(number), InputError, f"{name} to be a whole number of at least 1", got=repr(number))
    return int(number)  # type: ignore[call-overload, no-any-return]  # a whole number


def device_named(name: str | torch.device) -> torch.device:
    """Raises :class:`InputError` for a name that torch does not know."""
    try:
        return torch.device(name)
    except RuntimeError:
        raise InputError(f"expected a device such as cpu, cuda or cuda:1, got {name!r}") from None


def tuned(target: Target, file: Path | None) -> Target:
    """The target with what a tuning.json has for its GPU and versions; a warning where it has nothing."""
    if file is None or target.backend != "cuda":
        return target
    from prunevit_kernels.tuning import Tuning, machine_name

    try:
        tuning = Tuning.read(file, machine_name(target.device))
    except ContractError as error:
        raise CheckpointError(f"{file}: {error}") from error
    if not tuning:
        warnings.warn(
            f"{file} was tuned on {'; '.join(tuning.others) or 'no machine'}, not on {tuning.machine}: tile sizes and "
            f"kernels are the defaults. `python -m prunevit.runtime.tune {file.parent}` adds this machine.",
            UntunedMachine,
            stacklevel=3,
        )
        return target
    return replace(target, tuning=tuning)


def _automatic(device: torch.device, dtype: torch.dtype | None) -> BackendName:
    if device.type == "cuda" and dtype in (None, *HALF):
        return "cuda"
    if device.type != "cpu" or dtype not in (None, torch.float32):
        return "torch"
    if cpu_extension_built():
        return "cpu"
    warnings.warn(
        f"the C++ kernels are not built: running on the reference ops, several times slower. Build them with {BUILD}.",
        RuntimeWarning,
        stacklevel=4,
    )
    return "torch"
