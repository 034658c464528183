"""What can be removed from a ViT: the atoms that every weight is indexed by, and the groups that are ranked.

An *atom* is an index of one prunable axis: a residual channel, a query-key pair or a value neuron of a head, a neuron
of an MLP, a residual channel as one matrix reads it. :class:`Atoms` numbers them all and says which atom each row and
column of each weight belongs to; magnitude, gradients, surgery, masks and lifting all read that one table. A *group*
is a list of units ranked against each other: the neurons of one MLP, the query-key pairs of one head, the heads of a
layer, the sublayers of a model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ..errors import PruningError, expect
from ..spec import BlockSpec, ViTSpec

Kind = Literal["head", "qk", "v", "mlp", "channel", "read", "sublayer"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Group:
    """Units of one kind that are ranked against each other.

    ``layer`` is the address that patterns match and scores are normalised within; ``head`` is set where the units are
    inside one head, ``blocks`` where each unit is a whole sublayer of the block of that place.
    """

    kind: Kind
    layer: str
    size: int
    block: int = -1
    head: int = -1
    blocks: tuple[int, ...] = ()

    def address(self, unit: int) -> str:
        """Where one unit is, as patterns name it: ``blocks.3.attn.qk``, ``blocks.3.mlp.sublayer``, ``channel``."""
        return self.layer.replace("*", str(self.blocks[unit])) if self.blocks else self.layer


Scores: TypeAlias = Mapping[Group, Tensor]
"""A score for each unit of each group; the lowest go first, before all others those of −∞, which are worth nothing."""


def matches(address: str, pattern: str) -> bool:
    """Whether a pattern names an address: as a glob, as a part that holds it, or as its kind.

    >>> [matches("blocks.3.attn.qk", p) for p in ("blocks.3.*", "blocks.3.attn", "qk", "blocks.3.mlp")]
    [True, True, True, False]
    """
    return fnmatchcase(address, pattern) or address.startswith(pattern + ".") or address.rpartition(".")[2] == pattern


def groups_of(spec: ViTSpec, kinds: Iterable[Kind]) -> list[Group]:
    """All groups of some kinds, in the model's order."""
    return list(_groups_of(spec, check_kinds(kinds)))


def check_kinds(kinds: Iterable[str]) -> tuple[Kind, ...]:
    """Refuse a kind that does not exist, by name."""
    several = isinstance(kinds, Iterable) and not isinstance(kinds, str)
    asked: tuple[object, ...] = tuple(kinds) if several else (kinds,)
    for kind in asked:
        expect(kind in KINDS, PruningError, f"kinds of group out of {', '.join(KINDS)}", got=repr(kind))
    return tuple(kind for kind in KINDS if kind in asked)


def _groups_of(spec: ViTSpec, kinds: Sequence[Kind]) -> Iterator[Group]:
    if "channel" in kinds:
        yield Group("channel", "channel", spec.embed_dim)
    for i, block in enumerate(spec.blocks):
        if block.qk_dims and "head" in kinds:
            yield Group("head", f"blocks.{i}.attn.head", block.num_heads, i)
        for kind, dims in (("qk", block.qk_dims), ("v", block.v_dims)):
            if kind in kinds:
                for h, width in enumerate(dims):
                    yield Group("qk" if kind == "qk" else "v", f"blocks.{i}.attn.{kind}", width, i, h)
        if block.mlp_dim and "mlp" in kinds:
            yield Group("mlp", f"blocks.{i}.mlp", block.mlp_dim, i)
        if "read" in kinds:
            for part, size in zip(("attn", "mlp"), read_sizes(spec, block)):
                if size:
                    yield Group("read", f"blocks.{i}.{part}.read", size, i)
    if "sublayer" in kinds:
        attn = tuple(i for i, block in enumerate(spec.blocks) if block.has_attn)
        mlp = tuple(i for i, block in enumerate(spec.blocks) if block.has_mlp)
        if attn:
            yield Group("sublayer", "blocks.*.attn.sublayer", len(attn), blocks=attn)
        if mlp:
            yield Group("sublayer", "blocks.*.mlp.sublayer", len(mlp), blocks=mlp)


def read_sizes(spec: ViTSpec, block: BlockSpec) -> tuple[int, int]:
    """How many residual channels qkv and fc1 read; 0 where there is no such matrix."""
    attn, mlp = (spec.embed_dim if listed is None else len(listed) for listed in (block.attn_reads, block.mlp_reads))
    return attn if block.qk_dims else 0, mlp if block.mlp_dim else 0


class Remainder:
    """What is left of a spec as units go, as far as no spec can be without it.

    The first token selection needs a head before it, to take scores from; each list of channels that a matrix reads or
    writes needs one of them.
    """

    def __init__(self, spec: ViTSpec) -> None:
        first = next((i for i, block in enumerate(spec.blocks) if block.select is not None), -1)
        select = spec.blocks[first].select if first >= 0 else None
        scoring = range(first + (select.before == "mlp") if select is not None else 0)
        self.heads = {i: set(range(n)) for i in scoring if (n := spec.blocks[i].num_heads)}
        lists = [
            listed
            for block in spec.blocks
            for listed in (block.attn_reads, block.attn_writes, block.mlp_reads, block.mlp_writes)
            if listed is not None
        ]
        self.left = list(map(len, lists))
        self.lists_of: dict[int, list[int]] = {}
        for at, listed in enumerate(lists):
            for channel in listed:
                self.lists_of.setdefault(channel, []).append(at)

    def take(self, group: Group, units: Iterable[int]) -> bool:
        """Take units away, all or, where a last one is among them, none."""
        if group.kind == "channel":
            hit = Counter(at for unit in units for at in self.lists_of.get(unit, ()))
            if any(self.left[at] <= count for at, count in hit.items()):
                return False
            for at, count in hit.items():
                self.left[at] -= count
        elif self.heads and (group.kind == "head" or (group.kind == "sublayer" and ".attn." in group.layer)):
            if group.kind == "head":
                without = {group.block: self.heads.get(group.block, set()) - set(units)}
            else:
                without = {group.blocks[unit]: set[int]() for unit in units}
            heads = {i: without.get(i, kept) for i, kept in self.heads.items()}
            if not any(heads.values()):
                return False
            self.heads = heads
        return True


@dataclass(frozen=True)
class Atoms:
    """The numbering of a spec's atoms: channels first, then for each block its pairs, value neurons, MLP neurons, and
    what qkv and fc1 read.
    """

    spec: ViTSpec
    channel: range
    qk: tuple[tuple[range, ...], ...]
    v: tuple[tuple[range, ...], ...]
    mlp: tuple[range, ...]
    reads: tuple[tuple[range, range], ...]
    total: int

    @classmethod
    def of(cls, spec: ViTSpec) -> Atoms:
        at = 0

        def take(n: int) -> range:
            nonlocal at
            at += n
            return range(at - n, at)

        channel = take(spec.embed_dim)
        qk, v, mlp, reads = [], [], [], []
        for block in spec.blocks:
            qk.append(tuple(take(n) for n in block.qk_dims))
            v.append(tuple(take(n) for n in block.v_dims))
            mlp.append(take(block.mlp_dim))
            attn_read, mlp_read = read_sizes(spec, block)
            reads.append((take(attn_read), take(mlp_read)))
        return cls(spec, channel, tuple(qk), tuple(v), tuple(mlp), tuple(reads), at)

    def in_group(self, group: Group) -> slice:
        """The atoms of a group whose units are single atoms."""
        if group.kind == "channel":
            atoms = self.channel
        elif group.kind == "mlp":
            atoms = self.mlp[group.block]
        elif group.kind == "read":
            atoms = self.reads[group.block][".mlp." in group.layer]
        else:
            atoms = (self.qk if group.kind == "qk" else self.v)[group.block][group.head]
        return slice(atoms.start, atoms.stop)

    def read_channels(self) -> tuple[Tensor, Tensor]:
        """The atoms of all reads, and the channel that each reads."""
        atoms, channels = [], []
        for block, (attn, mlp) in zip(self.spec.blocks, self.reads):
            for listed, ids in ((block.attn_reads, attn), (block.mlp_reads, mlp)):
                atoms.append(_ids(ids))
                every = torch.arange(self.spec.embed_dim) if listed is None else torch.tensor(listed)
                channels.append(every[: len(ids)])
        return (torch.cat(atoms), torch.cat(channels)) if atoms else (_ids(), _ids())

    def axes(self) -> dict[str, tuple[Tensor | None, ...]]:
        """For each prunable parameter of a PrunedViT, the atom of each index of each axis (None: not prunable)."""
        spec, channel = self.spec, _ids(self.channel)
        last = (None, None, channel)
        table: dict[str, tuple[Tensor | None, ...]] = {
            "cls_token": last,
            "dist_token": last,
            "reg_token": last,
            "pos_embed": last,
            "patch_embed.proj.weight": (channel, None, None, None),
            "patch_embed.proj.bias": (channel,),
            "head.weight": (None, channel),
            "head_dist.weight": (None, channel),
        }
        for norm in ("patch_embed.norm", "norm_pre", "norm", "fc_norm"):
            table |= {f"{norm}.weight": (channel,), f"{norm}.bias": (channel,)}
        for i, block in enumerate(spec.blocks):
            table |= {f"blocks.{i}.{name}": axes for name, axes in self._block_axes(i, block).items()}
        return table

    def _block_axes(self, i: int, block: BlockSpec) -> dict[str, tuple[Tensor | None, ...]]:
        channel = _ids(self.channel)
        write_attn, write_mlp = (
            channel if listed is None else channel[list(listed)] for listed in (block.attn_writes, block.mlp_writes)
        )
        read_attn, read_mlp = map(_ids, self.reads[i])
        q, v, mlp = _ids(*self.qk[i]), _ids(*self.v[i]), _ids(self.mlp[i])
        table: dict[str, tuple[Tensor | None, ...]] = {
            "attn.qkv.weight": (torch.cat([q, q, v]), read_attn),
            "attn.qkv.bias": (torch.cat([q, q, v]),),
            "attn.proj.weight": (write_attn, v),
            "attn.proj.bias": (write_attn,),
            "ls1.gamma": (write_attn,),
            "mlp.fc1.weight": (mlp, read_mlp),
            "mlp.fc1.bias": (mlp,),
            "mlp.fc2.weight": (write_mlp, mlp),
            "mlp.fc2.bias": (write_mlp,),
            "ls2.gamma": (write_mlp,),
        }
        for norm in ("norm1", "norm2"):
            table |= {f"{norm}.weight": (channel,), f"{norm}.bias": (channel,)}
        return table


def _ids(*ranges: range) -> Tensor:
    return torch.cat([torch.arange(r.start, r.stop) for r in ranges]) if ranges else torch.zeros(0, dtype=torch.long)
