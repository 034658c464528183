"""Plan: which indices of a dense model are kept. What it leaves is a spec; what it is worth is for others to say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from .._frozen import Document, Frozen
from ..errors import PruningError, expect
from ..models import PrunedViT
from ..spec import BlockSpec, TokenSelect, ViTSpec
from .groups import KINDS, Atoms, Group, groups_of

Index = Annotated[int, Field(ge=0, lt=2**18)]
Indices = Annotated[tuple[Index, ...], Field(max_length=2**18)]


class BlockPlan(Frozen):
    """What is kept of one block. ``qk`` and ``v`` have one entry a kept head, with indices inside that head.

    A block that keeps no head (no neuron) is emptied: its output bias stays. One whose ``has_attn`` (``has_mlp``) is
    false is removed. ``attn_reads`` and ``mlp_reads`` are the dense channels that qkv and fc1 still read, of those that
    are kept at all, and ``select`` adds a token reduction; None leaves whatever the dense block has.
    """

    kind = "part of a plan"
    error = PruningError

    heads: Annotated[Indices, Field(max_length=256)]
    qk: Annotated[tuple[Indices, ...], Field(max_length=256)]
    v: Annotated[tuple[Indices, ...], Field(max_length=256)]
    mlp: Indices
    has_attn: bool = True
    has_mlp: bool = True
    attn_reads: Indices | None = None
    mlp_reads: Indices | None = None
    select: TokenSelect | None = None


class Plan(Document):
    """Kept indices of a dense spec. ``norm_gain`` multiplies every LayerNorm weight of the residual stream.

    Over the kept channels alone the variance of the stream grows by about E/E′, so that √(E/E′) restores what the
    readers saw; it is a field so that plans compose exactly.
    """

    kind = "plan"
    error = PruningError

    format_version: Literal[1] = 1
    dense: ViTSpec
    channels: Annotated[Indices, Field(min_length=1)]
    norm_gain: Annotated[float, Field(gt=0, le=1e3)] = 1.0
    blocks: Annotated[tuple[BlockPlan, ...], Field(max_length=1024)]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        dense = self.dense
        _check("channels", self.channels, dense.embed_dim)
        if len(self.channels) < dense.embed_dim and dense.attn_pool is not None:
            raise ValueError("channels: attention pooling fixes the residual width; expected all channels kept")
        if len(self.blocks) != dense.depth:
            raise ValueError(f"blocks: expected one for each of {dense.depth} dense blocks, got {len(self.blocks)}")
        for i, (kept, block) in enumerate(zip(self.blocks, dense.blocks)):
            where = f"blocks.{i}"
            _check(f"{where}.heads", kept.heads, block.num_heads)
            for name, each, widths in (("qk", kept.qk, block.qk_dims), ("v", kept.v, block.v_dims)):
                if len(each) != len(kept.heads):
                    raise ValueError(
                        f"{where}.{name}: expected an entry a kept head, {len(kept.heads)}, got {len(each)}"
                    )
                for place, h in enumerate(kept.heads):
                    _check(f"{where}.{name}.{place}", each[place], widths[h], least=1)
            _check(f"{where}.mlp", kept.mlp, block.mlp_dim)
            for part in ("attn_reads", "mlp_reads"):
                reads, all_reads = getattr(kept, part) or (), getattr(block, part)
                _check(f"{where}.{part}", reads, dense.embed_dim)
                if all_reads is not None and not set(reads) <= set(all_reads):
                    raise ValueError(f"{where}.{part}: expected channels that the dense block reads")
            for part in ("has_attn", "has_mlp"):
                if getattr(kept, part) and not getattr(block, part):
                    raise ValueError(f"{where}.{part}: the dense block has it removed already")
        self.spec()
        return self

    # -- shape -------------------------------------------------------------------------------------------------------

    def spec(self) -> ViTSpec:
        """The shape that is left."""
        place = {channel: at for at, channel in enumerate(self.channels)}
        blocks = []
        for i, (kept, block) in enumerate(zip(self.blocks, self.dense.blocks)):
            listed: dict[str, tuple[int, ...] | None] = {}
            for name in ("attn_reads", "attn_writes", "mlp_reads", "mlp_writes"):
                channels = getattr(block, name)
                if name.endswith("reads") and getattr(kept, name) is not None:
                    channels = getattr(kept, name)
                listed[name] = None if channels is None else tuple(place[c] for c in channels if c in place)
                if listed[name] == ():
                    raise ValueError(f"blocks.{i}.{name}: none of its channels is kept")
            blocks.append(
                BlockSpec(
                    qk_dims=tuple(len(pairs) for pairs in kept.qk),
                    v_dims=tuple(len(neurons) for neurons in kept.v),
                    attn_scale=block.attn_scale,
                    mlp_dim=len(kept.mlp),
                    has_attn=kept.has_attn,
                    has_mlp=kept.has_mlp,
                    select=kept.select or block.select,
                    **listed,
                )
            )
        return self.dense.replace(embed_dim=len(self.channels), blocks=tuple(blocks))

    def kept_atoms(self) -> Tensor:
        """A boolean for each atom of the dense spec."""
        atoms = Atoms.of(self.dense)
        kept = torch.zeros(atoms.total, dtype=torch.bool)
        kept[atoms.channel.start + torch.tensor(self.channels)] = True
        for i, block in enumerate(self.blocks):
            for place, h in enumerate(block.heads):
                kept[atoms.qk[i][h].start + torch.tensor(block.qk[place])] = True
                kept[atoms.v[i][h].start + torch.tensor(block.v[place])] = True
            if block.mlp:
                kept[atoms.mlp[i].start + torch.tensor(block.mlp)] = True
        reads, channels = atoms.read_channels()
        kept[reads] = kept[channels]
        for block, (attn, mlp) in zip(self.blocks, atoms.reads):
            for listed, ids in ((block.attn_reads, attn), (block.mlp_reads, mlp)):
                if listed is not None and len(ids):
                    own = (reads >= ids.start) & (reads < ids.stop)
                    kept[reads[own]] &= torch.isin(channels[own], torch.tensor(listed))
        return kept

    # -- making ------------------------------------------------------------------------------------------------------

    @classmethod
    def keep_all(cls, dense: ViTSpec) -> Plan:
        return cls.without(dense, {})

    @classmethod
    def of(cls, model: PrunedViT) -> Plan:
        """What is kept in a model of its first dense one: all, where it was never pruned.

        Raises :class:`PruningError` where the model has other blocks by now than its plan leaves.
        """
        if model.plan is None:
            return cls.keep_all(model.spec)
        plan = cls.from_dict(model.plan)
        left, now = plan.spec(), model.spec
        what = f"the {left.depth} blocks of width {left.embed_dim} that model.plan leaves (None: the model is dense)"
        got = f"{now.depth} of width {now.embed_dim}, changed since"
        expect(same_shape(left, now), PruningError, what, got=got)
        return plan

    @classmethod
    def without(cls, dense: ViTSpec, dropped: Mapping[Group, Iterable[int]], *, rescale_norms: bool = True) -> Plan:
        """All but the dropped units. A head that loses all of its pairs or values is dropped with them."""
        gone: dict[tuple[str, int, int], set[int]] = {}
        for group, units in dropped.items():
            if group.kind == "sublayer":
                part = "has_attn" if ".attn." in group.layer else "has_mlp"
                gone.setdefault((part, -1, -1), set()).update(group.blocks[u] for u in units)
            elif group.kind == "read":
                part = "attn_reads" if ".attn." in group.layer else "mlp_reads"
                gone.setdefault((part, group.block, -1), set()).update(units)
            else:
                gone.setdefault((group.kind, group.block, group.head), set()).update(units)

        def rest(n: int, kind: str, block: int = -1, head: int = -1) -> tuple[int, ...]:
            out = gone.get((kind, block, head), set())
            return tuple(u for u in range(n) if u not in out)

        channels = rest(dense.embed_dim, "channel")

        def reads(part: str, i: int) -> tuple[int, ...] | None:
            if not gone.get((part, i, -1)):
                return None
            listed = getattr(dense.blocks[i], part) or range(dense.embed_dim)
            stay = [listed[u] for u in rest(len(listed), part, i)]
            # where the channels that it still reads go for all, a matrix keeps one that stays
            return tuple(stay if set(stay) & set(channels) else [c for c in listed if c in set(channels)][:1])

        def without_part(part: str, i: int) -> bool:
            return i in gone.get((part, -1, -1), set())

        blocks = []
        for i, block in enumerate(dense.blocks):
            has_attn = block.has_attn and not without_part("has_attn", i)
            has_mlp = block.has_mlp and not without_part("has_mlp", i)
            heads = [
                (h, qk, v)
                for h in (rest(block.num_heads, "head", i) if has_attn else ())
                if (qk := rest(block.qk_dims[h], "qk", i, h)) and (v := rest(block.v_dims[h], "v", i, h))
            ]
            blocks.append(
                BlockPlan(
                    heads=tuple(h for h, _, _ in heads),
                    qk=tuple(qk for _, qk, _ in heads),
                    v=tuple(v for _, _, v in heads),
                    mlp=rest(block.mlp_dim, "mlp", i) if has_mlp else (),
                    has_attn=has_attn,
                    has_mlp=has_mlp,
                    attn_reads=reads("attn_reads", i) if heads else None,
                    mlp_reads=reads("mlp_reads", i) if has_mlp else None,
                )
            )
        gain = (dense.embed_dim / len(channels)) ** 0.5 if rescale_norms and channels else 1.0
        return cls(dense=dense, channels=channels, norm_gain=gain, blocks=tuple(blocks))

    def with_selection(self, selects: Sequence[TokenSelect | None]) -> Plan:
        """The same plan with token reductions, one entry a block."""
        expect(len(selects) == self.dense.depth, PruningError, f"{self.dense.depth} selections", got=len(selects))
        blocks = tuple(
            BlockPlan(**{**dict(block), "select": select or block.select})
            for block, select in zip(self.blocks, selects)
        )
        return Plan(**{**dict(self), "blocks": blocks})

    def then(self, inner: Plan) -> Plan:
        """The plan that does this one and then ``inner``, a plan of the model that this one leaves.

        Classes, pooling and image size are those that ``inner`` knows: the model may have got others since.
        """
        fits = same_shape(inner.dense, self.spec())
        expect(fits, PruningError, "a second plan made for what the first leaves", got="another model")
        blocks = []
        for outer, second in zip(self.blocks, inner.blocks):
            blocks.append(
                BlockPlan(
                    heads=_pick(outer.heads, second.heads),
                    qk=tuple(_pick(outer.qk[h], second.qk[place]) for place, h in enumerate(second.heads)),
                    v=tuple(_pick(outer.v[h], second.v[place]) for place, h in enumerate(second.heads)),
                    mlp=_pick(outer.mlp, second.mlp),
                    has_attn=second.has_attn,
                    has_mlp=second.has_mlp,
                    attn_reads=_pick(self.channels, second.attn_reads) or outer.attn_reads,
                    mlp_reads=_pick(self.channels, second.mlp_reads) or outer.mlp_reads,
                    select=second.select or outer.select,
                )
            )
        return Plan(
            dense=inner.dense.replace(embed_dim=self.dense.embed_dim, blocks=self.dense.blocks),
            channels=_pick(self.channels, inner.channels),
            norm_gain=self.norm_gain * inner.norm_gain,
            blocks=tuple(blocks),
        )

    # -- models ------------------------------------------------------------------------------------------------------

    def mask(self, dense: nn.Module) -> nn.Module:
        """The dense-sized model that computes what this plan keeps. ``dense`` is left as it is."""
        from .mask import masked

        return masked(dense, self)

    def lift(self, compact: nn.Module) -> nn.Module:
        """The compact model's present weights scattered back into the dense shape; computes what ``compact`` does."""
        from .mask import lifted

        return lifted(compact, self)


def same_shape(a: ViTSpec, b: ViTSpec) -> bool:
    """Whether two specs have the same prunable widths; classes, pooling and image size may differ."""
    return a.embed_dim == b.embed_dim and a.blocks == b.blocks


def origins(given: Plan, now: Plan, groups: Iterable[Group]) -> dict[Group, Group]:
    """Each group of what ``now`` leaves as it is in what ``given`` leaves, an earlier plan of the same dense model."""

    def place(plan: Plan, group: Group) -> tuple[str, int]:
        return group.layer, plan.blocks[group.block].heads[group.head] if group.head >= 0 else -1

    before = {place(given, group): group for group in groups_of(given.spec(), KINDS)}
    return {group: before[place(now, group)] for group in groups}


def _pick(indices: Sequence[int], places: Sequence[int] | None) -> tuple[int, ...]:
    return tuple(indices[p] for p in places or ())


def _check(where: str, indices: Sequence[int], size: int, least: int = 0) -> None:
    if any(a >= b for a, b in pairwise(indices)):
        raise ValueError(f"{where}: expected ascending distinct indices, got {list(indices[:8])}…")
    if indices and indices[-1] >= size:
        raise ValueError(f"{where}: expected indices below {size}, got {indices[-1]}")
    if len(indices) < least:
        raise ValueError(f"{where}: expected at least {least} kept, got none")
