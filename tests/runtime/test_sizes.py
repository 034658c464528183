"""The steps by their sizes alone are the steps of the plan, and their buffers those of the engine."""

from __future__ import annotations

import pytest
import torch

from prunevit import shapes
from prunevit.runtime import Runtime
from prunevit.runtime.sizes import memory_bytes, sizes_of
from prunevit_kernels import FusedMlp, LinearResidual, NormLinear, RaggedAttention, Target, TokenScores
from tests.specs import SPECS, random_images, random_model

OPS = {
    "PatchEmbed": "patch_embed",
    "NormLinear": "norm_linear",
    "RaggedAttention": "ragged_attention",
    "TokenScores": "token_scores",
    "LinearResidual": "linear_residual",
    "FusedMlp": "fused_mlp",
    "SelectTokens": "select_tokens",
    "PoolHead": "pool_head",
    "LatentPool": "latent_pool",
}


@pytest.mark.parametrize("name", SPECS)
def test_sizes_are_those_of_the_plan(name: str) -> None:
    runtime = Runtime(random_model(SPECS[name]), device="cpu", backend="torch")
    plan, sizes = runtime.plan(), sizes_of(SPECS[name], runtime.target)
    assert [OPS[type(step.op).__name__] for step in plan.steps] == [size.op for size in sizes]
    for step, size in zip(plan.steps, sizes):
        assert step.views == size.views
        op, widths = step.op, list(size.widths)
        if isinstance(op, NormLinear):
            n, width, out, *reads = widths
            assert (op.embed_dim, op.out_dim, bool(reads)) == (width, out, op.reads is not None)
            assert reads in ([], [op.weight.shape[1]])
            assert n == step.views[0].tokens
        elif isinstance(op, LinearResidual):
            _, inside, width, *writes = widths
            assert (op.in_dim, op.embed_dim, bool(writes)) == (inside, width, op.writes is not None)
            assert size.fixed == (op.writes is not None, op.gamma is not None)
            assert writes in ([], [op.weight.shape[0]])
        elif isinstance(op, FusedMlp):
            limits = [len(channels) for channels in (op.reads, op.writes) if channels is not None]
            assert widths[1:] == [op.embed_dim, op.hidden_dim, *limits]
            assert size.fixed == (op.act, op.reads is not None, op.writes is not None, op.gamma is not None)
        elif isinstance(op, RaggedAttention | TokenScores):
            assert size.fixed[1] == len(op.heads)
            assert widths[1:] == [sum(op.heads.qk_dims) / len(op.heads), sum(op.heads.v_dims) / len(op.heads)]


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("batch", [1, 3])
def test_memory_is_that_of_the_engine_and_the_parameters(name: str, batch: int) -> None:
    spec = SPECS[name]
    runtime = Runtime(random_model(spec), device="cpu")
    runtime(random_images(spec, batch))
    (program,) = runtime._engine.programs.values()
    held = sum(memory.nbytes for memory in program.storage.values())
    assert memory_bytes(spec, runtime.target, batch) == held + 4 * spec.params()


def test_a_gpu_has_copies_of_few_images_only() -> None:
    gpu, spec = Target("cuda", torch.device("cuda"), torch.float16), shapes.get("snp_deit_tiny")

    def growth(few: int, many: int) -> float:
        return (memory_bytes(spec, gpu, many) - memory_bytes(spec, gpu, few)) / (many - few)

    assert growth(16, 32) == growth(64, 128) + 2 * 3 * 224 * 224


def test_a_gpu_aligns_what_the_heads_leave() -> None:
    target = Target("torch", torch.device("cpu"))
    gpu = Target("cuda", torch.device("cuda"), torch.bfloat16)
    spec = SPECS["every_head_its_own_width"]
    plain, aligned = (next(s for s in sizes_of(spec, t) if s.op == "norm_linear") for t in (target, gpu))
    assert plain.widths[2] == 2 * (13 + 5 + 1) + 12 + 3 + 7
    assert aligned.widths[2] == 2 * (16 + 8 + 8) + 16 + 8 + 8
