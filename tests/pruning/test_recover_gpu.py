"""Recovery on a GPU: mixed precision in both 16-bit types, and resuming with the gradient scaler's state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prunevit.pruning import Step, accuracy, recover
from prunevit.pruning.training_state import read_facts
from tests.pruning.test_recover import fresh, problem, weights

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_learns_as_fp32_does(dtype: str) -> None:
    single, mixed = fresh().cuda(), fresh().cuda()
    start = weights(single)
    data = problem()
    plain = recover(single, data, epochs=10, lr=3e-3, amp=False)
    history = recover(mixed, data, epochs=10, lr=3e-3, amp=True, amp_dtype=dtype, clip_grad=1e9)
    assert {p.dtype for p in mixed.parameters()} == {torch.float32}
    assert history[-1]["loss"] == pytest.approx(plain[-1]["loss"], abs=0.3 * plain[0]["loss"])
    assert accuracy(mixed, data) > 0.4
    assert not torch.equal(weights(mixed), start)


def test_mixed_precision_is_the_default_on_a_gpu() -> None:
    default, asked = fresh().cuda(), fresh().cuda()
    recover(default, problem(), epochs=2)
    recover(asked, problem(), epochs=2, amp=True)
    torch.testing.assert_close(weights(default), weights(asked), rtol=1e-3, atol=1e-4)


def test_an_interrupted_fp16_run_keeps_its_loss_scale(tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def stop(step: Step) -> None:
        if step.epoch == 1:
            raise Interrupted

    recipe = {"epochs": 3, "amp": True, "amp_dtype": "float16"}
    whole, again = fresh().cuda(), fresh().cuda()
    history = recover(whole, problem(), **recipe)  # type: ignore[arg-type]
    with pytest.raises(Interrupted):
        recover(fresh().cuda(), problem(), state=tmp_path / "run", on_step=stop, **recipe)  # type: ignore[arg-type]
    assert read_facts(tmp_path / "run")["scaler"]["scale"] > 0
    resumed = recover(again, problem(), state=tmp_path / "run", **recipe)  # type: ignore[arg-type]
    assert [epoch["steps"] for epoch in resumed] == [epoch["steps"] for epoch in history]
    torch.testing.assert_close(weights(again), weights(whole), rtol=1e-2, atol=1e-3)
