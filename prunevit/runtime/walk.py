"""A walk through a spec as it runs: what each step finds, whichever way its step is then made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from prunevit_kernels import Pool, Rule

from ..spec import BlockSpec, TokenSelect, ViTSpec

# Copying more than this costs a GPU more time than a launch of its own costs the CPU: some 10 µs, by arithmetic.
COPIED_BYTES = 16 << 20


@dataclass(frozen=True)
class View:
    """A [B, tokens, width] window on a named buffer ([B, tokens] where width is 0), or its ``first`` tokens only."""

    buffer: str
    tokens: int
    width: int
    first: int | None = None


class Walk(ABC):
    """The parts of a model in order, with the buffers as they are at that point."""

    def __init__(self, spec: ViTSpec, grid: tuple[int, int]) -> None:
        self.spec, self.grid = spec, grid
        self.tokens = spec.num_prefix_tokens + grid[0] * grid[1]
        self.turn = 0  # which of x0, x1 (and scores0, scores1) is current: a selection moves to the other
        self.first: int | None = None
        self.last_attention = _last_attention(spec)
        self.score_sources = _score_sources(spec, self.last_attention)

    def walk(self) -> None:
        self.stem()
        for index, block in enumerate(self.spec.blocks):
            self._select(index, block.select, "attn")
            self.attention(index, block)
            self._select(index, block.select, "mlp")
            self.mlp(index, block)
        if self.spec.distilled and not self.spec.num_classes:
            self.first = 2  # without heads to read them, timm averages the class and distillation tokens
        self.head()

    @property
    def x(self) -> View:
        return View(f"x{self.turn}", self.tokens, self.spec.embed_dim, self.first)

    @property
    def scores(self) -> View:
        return View(f"scores{self.turn}", self.tokens, 0)

    @property
    def rows(self) -> int:
        """How many tokens of an image anyone still reads."""
        return self.first or self.tokens

    @property
    def selection_rule(self) -> tuple[Rule, bool]:
        """The one rule, and whether it cascades, of all of the model's selections (the spec holds them to one)."""
        assert self.spec.selection is not None, "asked for only where tokens are scored"
        return self.spec.selection

    def _select(self, index: int, select: TokenSelect | None, before: str) -> None:
        if select is None or select.before != before or self.first is not None:
            return  # once one row is all that anyone reads, which others stay no longer matters
        x, scores = self.x, self.scores
        self.turn, self.tokens = 1 - self.turn, self.spec.num_prefix_tokens + select.keep + int(select.fuse)
        self.select_tokens(index, select, x, scores)

    @abstractmethod
    def stem(self) -> None: ...

    @abstractmethod
    def attention(self, index: int, block: BlockSpec) -> None:
        """Sets ``first`` once the block that mixes tokens last has its keys."""

    @abstractmethod
    def mlp(self, index: int, block: BlockSpec) -> None: ...

    @abstractmethod
    def select_tokens(self, index: int, select: TokenSelect, x: View, scores: View) -> None:
        """``x`` and ``scores`` are those before it, ``self.x`` and ``self.scores`` what is left."""

    @abstractmethod
    def head(self) -> None: ...


def pooling(spec: ViTSpec) -> tuple[Pool, int]:
    """How the head pools the tokens that it is given, and how many of the first it leaves out."""
    if spec.distilled and not spec.num_classes:
        return "avg", 0  # of the two tokens that are all it is given
    if spec.distilled:
        return "tokens", spec.num_unpooled_tokens
    pool: Pool = "none" if spec.global_pool == "" or spec.global_pool == "map" else spec.global_pool
    return pool, spec.num_unpooled_tokens


def _last_attention(spec: ViTSpec) -> int | None:
    """Under class-token pooling, the block whose attention mixes tokens last: from there on one row is enough."""
    if spec.global_pool != "token" or spec.distilled:
        return None
    with_heads = [i for i, block in enumerate(spec.blocks) if block.qk_dims]
    return with_heads[-1] if with_heads else None


def _score_sources(spec: ViTSpec, last_attention: int | None) -> set[int]:
    """The blocks whose attention some selection scores tokens by."""
    sources, latest, cascade = [], -1, False
    for index, block in enumerate(spec.blocks[: None if last_attention is None else last_attention + 1]):
        before = None if block.select is None else block.select.before
        cascade = cascade or (block.select is not None and block.select.cascade)
        if before == "attn":
            sources.append(latest)
        latest = index if block.qk_dims else latest
        if before == "mlp" and index != last_attention:
            sources.append(latest)
    if not cascade:
        return set(sources)
    return {i for i, block in enumerate(spec.blocks) if block.qk_dims and i <= max(sources, default=-1)}
