"""One step of any size, on random weights: what a cost table is measured from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from prunevit_kernels import (
    FusedMlp,
    HeadTable,
    Launch,
    LinearResidual,
    NormLinear,
    Op,
    PatchEmbed,
    PoolHead,
    RaggedAttention,
    SelectTokens,
    Target,
    TokenScores,
)

from ..runtime.latent_pool import LatentPool
from ..runtime.sizes import Fixed, StepSize
from ..runtime.stopwatch import stopwatch

EPS = 1e-6
ENOUGH_MS, ROUNDS = 30.0, 4  # a step and its reference are timed for at least so long, and at least so often
CALLS = 8  # in a row, each with weights of its own: in a model, a step's weights come from memory, not from cache


class Clock:
    """Times steps of a target and batch, each in turns with one reference step.

    A machine that is busy with something else slows both: a time counts as a multiple of the reference's, on the
    scale of ``reference_ms``, what the reference took at first.
    """

    def __init__(self, target: Target, batch: int, reference: StepSize, reference_ms: float | None = None) -> None:
        self.target, self.maker = target, _Maker(target, batch)
        widths = [round(width) for width in reference.widths]
        self._timed_reference = self._timed(reference.op, reference.fixed, widths, calls=2)
        self.reference_ms = reference_ms or min(min(self._timed_reference()) for _ in range(4 * ROUNDS))

    def step_ms(self, op: str, fixed: Fixed, widths: Sequence[int]) -> float:
        """The time of one step: the least of many, since what else the machine does only adds to it."""
        timed = self._timed(op, fixed, widths)
        best, beside, spent, rounds = float("inf"), float("inf"), 0.0, 0
        while spent < ENOUGH_MS or rounds < ROUNDS:
            reference, taken = self._timed_reference(), timed()
            best, beside, rounds = min(best, *taken), min(beside, *reference), rounds + 1
            spent += sum(taken) + sum(reference)
        return best * self.reference_ms / beside

    def _timed(self, op: str, fixed: Fixed, widths: Sequence[int], calls: int = CALLS) -> Callable[[], list[float]]:
        timed = stopwatch(self.maker.launches(op, fixed, widths, calls), self.target)
        timed()
        return timed


class _Maker:
    """Ops and their buffers; chance is its own."""

    def __init__(self, target: Target, batch: int) -> None:
        self.target, self.batch = target, batch
        self.chance = torch.Generator().manual_seed(0)

    def launches(self, op: str, fixed: Fixed, widths: Sequence[int], calls: int) -> list[Launch]:
        make: Callable[..., tuple[Op, list[Tensor]]] = getattr(self, f"_{op}")
        made, buffers = make(fixed, *widths)
        return [made.pack(self.target).bind(*buffers) for _ in range(calls)]

    def random(self, *shape: int) -> Tensor:
        """As large as a weight whose output is about as large as its input."""
        return torch.randn(shape, generator=self.chance) * (shape[-1] ** -0.5 if len(shape) > 1 else 1.0)

    def buffer(self, tokens: int, width: int) -> Tensor:
        """[B, tokens, width] with the pitch that the target gives rows."""
        filled = torch.randn(self.batch, tokens, self.target.pitch(width), generator=self.chance)
        return filled.to(self.target.device, self.target.dtype)[..., :width]

    def scores(self, tokens: int) -> Tensor:
        return torch.rand(self.batch, tokens, generator=self.chance).to(self.target.device)

    def _patch_embed(self, fixed: Fixed, width: int) -> tuple[Op, list[Tensor]]:
        channels, p, q, rows, columns, prefix, embed_norm, pre_norm = map(int, fixed)
        norm = torch.stack([torch.ones(width), torch.zeros(width)])
        op = PatchEmbed(
            weight=self.random(width, channels, p, q),
            bias=self.random(width),
            positions=self.random(rows * columns, width),
            prefix=self.random(prefix, width),
            eps=EPS,
            embed_norm=norm if embed_norm else None,
            pre_norm=norm if pre_norm else None,
        )
        images = torch.randn(self.batch, channels, p * rows, q * columns, generator=self.chance)
        images = images.to(self.target.device, self.target.dtype)
        return op, [images, self.buffer(prefix + rows * columns, width)]

    def _norm_linear(self, fixed: Fixed, n: int, width: int, out: int, reads: int = 0) -> tuple[Op, list[Tensor]]:
        channels = _spread(reads, width)
        weight = self.random(out, width if channels is None else len(channels))
        op = NormLinear(width, weight, self.random(out), EPS, channels)
        return op, [self.buffer(n, width), self.buffer(n, out)]

    def _heads(self, count: int, qk: int, v: int) -> HeadTable:
        return HeadTable.packed([qk] * count, [v] * count, align=self.target.alignment)

    def _ragged_attention(self, fixed: Fixed, n: int, qk: int, v: int) -> tuple[Op, list[Tensor]]:
        queries, count = map(int, fixed)
        heads = self._heads(count, qk, v)
        return RaggedAttention(heads), [self.buffer(n, heads.width), self.buffer(queries or n, heads.out_width)]

    def _token_scores(self, fixed: Fixed, n: int, qk: int, v: int) -> tuple[Op, list[Tensor]]:
        rule, count = fixed
        heads = self._heads(int(count), qk, v)
        return TokenScores(heads, rule), [self.buffer(n, heads.width), self.scores(n)]  # type: ignore[arg-type]

    def _linear_residual(self, fixed: Fixed, n: int, inside: int, width: int, out: int = 0) -> tuple[Op, list[Tensor]]:
        channels = _spread(out, width)
        rows = width if channels is None else len(channels)
        gamma = self.random(rows) if fixed[-1] else None
        op = LinearResidual(width, self.random(rows, inside), self.random(rows), gamma, channels)
        return op, [self.buffer(n, inside), self.buffer(n, width)]

    def _fused_mlp(self, fixed: Fixed, n: int, width: int, hidden: int, *limits: int) -> tuple[Op, list[Tensor]]:
        act, limited_in, limited_out, scaled = fixed
        reads = _spread(limits[0], width) if limited_in else None
        writes = _spread(limits[-1], width) if limited_out else None
        inside, outside = (width if channels is None else len(channels) for channels in (reads, writes))
        w1, w2 = self.random(hidden, inside), self.random(outside, hidden)
        gamma = self.random(outside) if scaled else None
        b1, b2 = self.random(hidden), self.random(outside)
        op = FusedMlp(width, w1, b1, w2, b2, act, EPS, gamma, reads, writes)  # type: ignore[arg-type]
        return op, [self.buffer(n, width)]

    def _select_tokens(self, fixed: Fixed, n: int, keep: int, width: int) -> tuple[Op, list[Tensor]]:
        prefix, fuse = int(fixed[0]), bool(fixed[1])
        op = SelectTokens(width, max(1, min(keep, n - prefix)), prefix, fuse)
        m = op.out_tokens
        return op, [self.buffer(n, width), self.scores(n), self.buffer(m, width), self.scores(m)]

    def _pool_head(self, fixed: Fixed, n: int, width: int) -> tuple[Op, list[Tensor]]:
        pool, prefix, final_norm, fc_norm, classes = fixed
        norm = torch.stack([torch.ones(width), torch.zeros(width)])
        inside = 2 * width if pool == "tokens" else width
        weight = self.random(int(classes), inside) if classes else None
        norms = norm if final_norm else None, norm if fc_norm else None
        op = PoolHead(width, pool, int(prefix), EPS, *norms, weight, self.random(int(classes)) if classes else None)  # type: ignore[arg-type]
        rows = max(n, 2) if pool == "tokens" else max(n, int(prefix) + 1) if pool != "token" else n
        out = self.buffer(rows, int(classes) or inside)
        return op, [self.buffer(rows, width), out if pool == "none" else out[:, 0].contiguous()]

    def _latent_pool(self, fixed: Fixed, n: int, width: int) -> tuple[Op, list[Tensor]]:
        heads, hidden, prefix, classes = map(int, fixed)
        with torch.random.fork_rng([]):
            pool = AttentionPoolLatent(width, num_heads=heads, mlp_ratio=(hidden + 0.5) / width)
            head = nn.Linear(width, classes) if classes else nn.Identity()
        out = self.buffer(1, classes or width)[:, 0].contiguous()
        op = LatentPool(pool.eval(), nn.Identity(), head.eval(), prefix)
        return op, [self.buffer(max(n, prefix + 1), width), out]


def _spread(count: int, width: int) -> tuple[int, ...] | None:
    """So many of the residual channels, evenly; None where a step touches them all."""
    return tuple(i * width // min(count, width) for i in range(min(count, width))) if count else None
