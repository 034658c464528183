"""What can go wrong, by name. Every message says what was expected, what came, and where there is one, the fix."""

from __future__ import annotations


class PrunevitError(Exception):
    """The base of every error that prunevit raises on purpose."""


class SpecError(PrunevitError, ValueError):
    """A spec is malformed, out of bounds, or contradicts itself. The message names the field."""


class CheckpointError(PrunevitError, ValueError):
    """A checkpoint directory cannot be read, or its tensors are not those of its spec."""


class UnsupportedModel(PrunevitError, ValueError):
    """A model has a part that no spec describes. The message names the attribute."""


class PruningError(PrunevitError, ValueError):
    """A pruning method, group or plan does not fit the model."""


class BudgetError(PruningError):
    """A constraint cannot be met. The message has the floor that no pruning can go below."""


class InputError(PrunevitError, ValueError):
    """An input to the runtime has the wrong type, shape, dtype or device, or holds NaN."""


class DataError(PrunevitError, ValueError):
    """A data folder is missing or malformed, or does not fit the model."""


class MissingPackage(PrunevitError, ImportError):
    """An optional package is not installed. The message has the command that installs it."""


class RuntimeMismatch(PrunevitError):
    """The runtime's outputs differ from the model's by more than rounding: nothing is saved or served."""


class UntunedMachine(RuntimeWarning):
    """A checkpoint's tuning.json has nothing for this GPU with these versions: default tile sizes are used."""


def expect(condition: bool, error: type[PrunevitError], what: str, *, got: object) -> None:
    """Raise ``error`` unless ``condition`` holds; ``what`` completes the sentence "expected …"."""
    if not condition:
        raise error(f"expected {what}, got {got}")
