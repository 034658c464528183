"""Several processes share an epoch: every batch goes to one of them, and is read by no other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from prunevit.errors import PruningError
from prunevit.pruning.dealing import Dealer


class Augmented(Dataset[tuple[torch.Tensor, int]]):
    """Image i is the number i and a draw by chance."""

    def __init__(self, size: int = 24) -> None:
        self.size, self.read = size, list[int]()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.read.append(index)
        return torch.rand(()), index


ORDERS: dict[str, dict[str, Any]] = {
    "in_order": {},
    "shuffled_by_the_global_chance": {"shuffle": True},
    "shuffled_by_its_own": {"shuffle": True, "generator": torch.Generator()},
    "shuffled_with_a_part_of_a_batch": {"shuffle": True, "batch_size": 5},
    "without_the_last_part": {"shuffle": True, "batch_size": 5, "drop_last": True},
    "read_by_a_worker": {"shuffle": True, "num_workers": 1, "persistent_workers": True},
}


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(Augmented(), **{"batch_size": 4, **options})


def labels(batches: list[Any]) -> list[list[int]]:
    return [batch[1].tolist() for batch in batches]


@pytest.mark.parametrize("order", ORDERS)
def test_each_batch_of_one_process_goes_to_one_of_two(order: str) -> None:
    data, epochs = loader(**ORDERS[order]), []
    for epoch in range(2):
        whole = labels(list(Dealer(data, 0, 1).epoch(7, epoch)))
        whole = whole[: len(whole) // 2 * 2]
        read, dealt, draws = data.dataset.read, [], []
        for rank in range(2):
            read.clear()
            batches = list(Dealer(data, rank, 2).epoch(7, epoch))
            dealt.append(labels(batches))
            draws.append([draw for images, _ in batches for draw in images.tolist()])
            if not data.num_workers:
                assert read == [i for batch in dealt[rank] for i in batch], "nothing else was read"
        assert [batch for pair in zip(*dealt) for batch in pair] == whole
        assert not set(draws[0]) & set(draws[1]), "each process augments by its own chance"
        again = list(Dealer(data, 1, 2).epoch(7, epoch))
        assert (labels(again), [x for images, _ in again for x in images.tolist()]) == (dealt[1], draws[1])
        epochs.append((whole, draws))
    assert epochs[0][1] != epochs[1][1]
    assert (epochs[0][0] == epochs[1][0]) == (order == "in_order")


class Endless(IterableDataset[tuple[torch.Tensor, int]]):
    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        return iter([(torch.zeros(()), i) for i in range(24)])

    def __len__(self) -> int:
        return 24


def test_other_iterables_are_gone_through_whole() -> None:
    for data in (list(loader()), DataLoader(Endless(), 4), tuple(loader(shuffle=True))):
        parts = [labels(list(Dealer(data, rank, 2).epoch(0, 0))) for rank in range(2)]
        assert [batch for pair in zip(*parts) for batch in pair] == labels(list(data))


def test_a_distributed_sampler_has_dealt_already() -> None:
    dataset = Augmented()
    sampler = DistributedSampler(dataset, num_replicas=2, rank=1, shuffle=True)
    dealer = Dealer(DataLoader(dataset, 4, sampler=sampler), 1, 2)
    first, second = (labels(list(dealer.epoch(0, epoch))) for epoch in (0, 1))
    assert dealer.batches == len(first) == 3
    assert first != second


def test_fewer_batches_than_processes_are_refused() -> None:
    with pytest.raises(PruningError, match="a batch for each of 7 processes, got 6 batches"):
        Dealer(loader(), 0, 7)
