"""The vector functions against fp64, over every exponent, both signs, denormals, infinities and NaN."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from prunevit_kernels import cpu


def apply(name: str, x: Tensor) -> Tensor:
    y = torch.full_like(x, 7.0)
    cpu.extension().apply(name, x.data_ptr(), y.data_ptr(), x.numel())
    return y


def every_size_of_number() -> Tensor:
    """A thousand mantissas for each of a float's exponents, denormals among them, in both signs; and a fine grid."""
    mantissas = torch.randint(0, 1 << 23, (256, 1000), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    bits = (torch.arange(256, dtype=torch.int32)[:, None] << 23) | mantissas
    magnitudes = bits.view(torch.float32).flatten()
    magnitudes = magnitudes[magnitudes.isfinite()]
    return torch.cat([magnitudes, -magnitudes, torch.linspace(-160, 160, 400_001), torch.zeros(1), -torch.zeros(1)])


def ulp(x: Tensor) -> Tensor:
    """The distance between floats at x, no less than that of denormals."""
    exponent = torch.frexp(x.abs().clamp(2.0**-126, 3e38)).exponent
    return torch.ldexp(torch.ones_like(x), exponent - 24)


def phi(x: Tensor) -> Tensor:
    return 0.5 * torch.special.erfc(-x / math.sqrt(2))


def gelu_tanh(x: Tensor) -> Tensor:
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


# The function in fp64 and, for a result y at x, the unit that its error is counted in. In a product with Φ or a sigmoid
# that factor is held to a unit of one half: eager PyTorch's 1 + erf(x) is no better far below zero.
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "exp2": (torch.exp2, lambda x, y: ulp(y)),
    "sigmoid2": (lambda x: torch.sigmoid(x * math.log(2)), lambda x, y: ulp(y) + 2.0**-127),
    "gelu": (lambda x: x * phi(x), lambda x, y: ulp(torch.maximum(y.abs(), 0.5 * x.abs()))),
    "gelu_tanh": (gelu_tanh, lambda x, y: ulp(torch.maximum(y.abs(), 0.5 * x.abs()))),
    "quick_gelu": (lambda x: x * torch.sigmoid(1.702 * x), lambda x, y: ulp(torch.maximum(y.abs(), 0.5 * x.abs()))),
    "relu": (torch.relu, lambda x, y: ulp(y)),
}


# a sigmoid is an exponential, a sum and a quotient
LIMITS = {"exp2": 2.0, "sigmoid2": 2.5, "gelu": 2.0, "gelu_tanh": 2.5, "quick_gelu": 2.5, "relu": 0.0}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_within_two_units_or_so_of_fp64(name: str) -> None:
    function, unit = FUNCTIONS[name]
    x = every_size_of_number()
    got, want = apply(name, x).double(), function(x.double())
    overflows = want.abs() > torch.finfo(torch.float32).max
    assert torch.equal(got[overflows].isinf(), torch.ones_like(got[overflows], dtype=torch.bool))
    error = ((got - want).abs() / unit(x.double(), want))[~overflows]
    worst = error.nan_to_num(math.inf).argmax()
    assert error[worst] <= LIMITS[name], f"{error[worst]:.2f} units at {x[~overflows][worst]!r}"


@pytest.mark.parametrize(
    ("name", "at_minus_infinity", "at_infinity"),
    [("exp2", 0.0, math.inf), ("sigmoid2", 0.0, 1.0), ("gelu", 0.0, math.inf), ("relu", 0.0, math.inf)],
)
def test_infinities_and_nan(name: str, at_minus_infinity: float, at_infinity: float) -> None:
    got = apply(name, torch.tensor([-math.inf, math.inf, math.nan]))
    assert got[0].item() == at_minus_infinity
    assert got[1].item() == at_infinity
    assert got[2].isnan()


def test_exact_where_it_matters() -> None:
    assert apply("exp2", torch.zeros(1)).item() == 1
    assert apply("gelu", torch.zeros(1)).item() == 0


def test_an_unknown_function_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a function's name, got geluu"):
        apply("geluu", torch.zeros(1))


def test_small_inputs_keep_their_relative_accuracy() -> None:
    x = torch.logspace(-30, -2, 1000)
    got, want = apply("gelu", x).double(), x.double() * phi(x.double())
    assert ((got - want).abs() / want).max() < 2.5e-7
