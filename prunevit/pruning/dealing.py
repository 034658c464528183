"""Which batches of an epoch each of several processes trains on, and where their chance comes from."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence, Sized
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from ..errors import PruningError, expect
from .method import Batches


class Dealer:
    """Deals the batches of an epoch out to ``world`` processes: process ``rank`` gets every world-th, from its own on.

    They are the batches that one process would go through, in its order, whichever process they fall to. A plain
    ``DataLoader`` of an indexed dataset reads only those of its own process, which then augments by chance of its own.
    Of any other iterable every process goes through all batches and leaves out the others'. Data with a
    ``DistributedSampler`` is dealt out already.
    """

    def __init__(self, data: Batches, rank: int, world: int) -> None:
        expect(
            isinstance(data, Sized), PruningError, "data with a length, such as a DataLoader", got=type(data).__name__
        )
        self.data, self.rank, self.world = data, rank, world
        self.sampled = isinstance(getattr(data, "sampler", None), DistributedSampler)
        self.batches: int = len(data) // (1 if self.sampled else world)  # type: ignore[arg-type]
        expect(self.batches > 0, PruningError, f"a batch for each of {world} processes", got=f"{len(data)} batches")  # type: ignore[arg-type]

    def epoch(self, seed: int, epoch: int) -> Iterator[Sequence[Tensor]]:
        """This process's batches. All chance from here on comes from the seed, the epoch and, if need be, the rank."""
        data: Any = self.data
        _seed_all(data, seed, epoch, 0)
        if self.sampled:
            data.sampler.set_epoch(epoch)
            return iter(data)
        if not _by_index(data) or (self.world == 1 and not data.persistent_workers):
            return self._own(data)
        mine = list(self._own(_Order.of(data)))
        _seed_all(data, seed, epoch, self.rank)
        return iter(_reading(data, mine))

    def _own(self, batches: Any) -> Iterator[Any]:
        return islice(islice(batches, self.rank, None, self.world), self.batches)


def _seed_all(data: Any, seed: int, epoch: int, rank: int) -> None:
    seed = (seed * 1_000_003 + epoch + rank * 0x9E3779B1) % 2**32
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    for generator in (getattr(data, "generator", None), getattr(getattr(data, "collate_fn", None), "generator", None)):
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)


def _by_index(data: Any) -> bool:
    plain = type(data) is DataLoader and data.batch_sampler is not None
    return plain and not isinstance(data.dataset, IterableDataset)


class _Order(Dataset[int]):
    """Indices in place of what they stand for."""

    def __getitem__(self, index: int) -> int:
        return index

    def __getitems__(self, indices: list[int]) -> list[int]:
        return indices

    @classmethod
    def of(cls, loader: DataLoader[Any]) -> DataLoader[int]:
        """The loader's batches as indices, by the same draws that the loader itself would make."""
        return DataLoader(cls(), batch_sampler=loader.batch_sampler, collate_fn=list, generator=loader.generator)


def _reading(loader: DataLoader[Any], batches: list[list[int]]) -> DataLoader[Any]:
    """The loader on these batches alone. Its workers start anew: living on, they would keep the last epoch's chance."""
    return DataLoader(
        loader.dataset,
        batch_sampler=batches,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        in_order=loader.in_order,
    )
