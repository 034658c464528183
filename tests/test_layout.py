"""One op, one name: in the kernels, in the tests, and where an op is timed by itself, in the benchmarks."""

from __future__ import annotations

from pathlib import Path

import pytest

import prunevit_kernels
from prunevit_kernels import Op

ROOT = Path(__file__).parents[1]
OPS = sorted(path.parent.name for path in (ROOT / "kernels/prunevit_kernels").glob("*/reference.py"))
TIMED_ALONE = ["fused_mlp", "norm_linear", "ragged_attention"]


def test_there_are_ops() -> None:
    assert set(TIMED_ALONE) <= set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_one_name_everywhere(op: str) -> None:
    folder = ROOT / "kernels/prunevit_kernels" / op
    assert (folder / "__init__.py").exists()
    camel = "".join(part.capitalize() for part in op.split("_"))
    kind = getattr(prunevit_kernels, camel)
    assert issubclass(kind, Op)
    assert callable(getattr(__import__(f"prunevit_kernels.{op}", fromlist=[op]), op)), "the reference has the op's name"
    assert (ROOT / f"tests/kernels/test_{op}.py").exists()
    for module in ("_native", "_triton"):
        assert (folder / f"{module}.py").exists()


@pytest.mark.parametrize("op", TIMED_ALONE)
def test_a_heavy_op_has_a_benchmark_of_its_name(op: str) -> None:
    assert (ROOT / f"bench/{op}.py").exists()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "prunevit").rglob("*.py")) + sorted((ROOT / "kernels").rglob("*.py")), ids=str
)
def test_a_file_can_be_read_at_one_sitting(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= 350
