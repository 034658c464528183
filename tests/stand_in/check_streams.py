"""That the stand-in does what a GPU may do: run by test_stand_in.py, in a process of the stand-in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from .aten import twin
from .device import LATE

pytestmark = pytest.mark.gpu  # chosen by name where there is a stand-in, and nowhere else


def full(value: float) -> Tensor:
    return torch.full((1000,), value, device="cuda")


def at_work(into: Tensor, value: float) -> torch.cuda.Stream:
    """A stream that has still to fill ``into``."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        into.fill_(value)
    return stream


@pytest.mark.skipif(not LATE, reason="another order")
def test_nothing_is_done_before_it_is_waited_for() -> None:
    x = full(1)
    at_work(x, 2)
    assert (twin(x) == 1).all()
    torch.cuda.synchronize()
    assert (twin(x) == 2).all()


@pytest.mark.skipif(not LATE, reason="another order")
def test_a_missing_wait_shows() -> None:
    x = full(1)
    at_work(x, 2)
    assert (x.clone().cpu() == 1).all()


def test_a_stream_waits_for_another() -> None:
    x = full(1)
    torch.cuda.current_stream().wait_stream(at_work(x, 2))
    assert (x.clone().cpu() == 2).all()


def test_a_stream_waits_for_an_event_and_for_no_more() -> None:
    x, event = full(1), torch.cuda.Event()
    stream = at_work(x, 2)
    event.record(stream)
    with torch.cuda.stream(stream):
        x.fill_(3)
    torch.cuda.current_stream().wait_event(event)
    assert x.clone().cpu().unique().item() in ((2,) if LATE else (2, 3))
    event.synchronize()
    assert event.query()


@pytest.mark.skipif(not LATE, reason="another order")
@pytest.mark.parametrize("recorded", [False, True])
def test_memory_that_another_stream_still_reads_is_given_away_unless_recorded(recorded: bool) -> None:
    x, stream = full(1), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = x.clone()
    if recorded:
        x.record_stream(stream)
    address = x.data_ptr()
    del x
    other = full(2)
    assert (other.data_ptr() == address) is not recorded
    torch.cuda.current_stream().synchronize()
    stream.synchronize()
    assert (twin(out) == (1 if recorded else 2)).all()


def test_pageable_memory_is_read_at_once_and_pinned_memory_later() -> None:
    for pinned in (False, True):
        host = torch.ones(1000).pin_memory() if pinned else torch.ones(1000)
        x = torch.empty(1000, device="cuda")
        x.copy_(host, non_blocking=True)
        host.fill_(2)
        assert x.cpu().unique().item() in ((2,) if pinned and LATE else (1, 2) if pinned else (1,))


def test_random_numbers_go_on_from_draw_to_draw() -> None:
    first, second = (torch.Generator("cuda").manual_seed(5) for _ in range(2))
    draws = [torch.randn(8, generator=generator, device="cuda") for generator in (first, first, second)]
    assert not torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])


def test_a_graph_is_replayed_in_order() -> None:
    x, graph = full(1), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.mul_(2)
        x.add_(1)
    assert (x.cpu() == 1).all()
    for want in (3, 7, 15):
        graph.replay()
        assert (x.cpu() == want).all()


def test_a_graph_of_two_streams() -> None:
    x, y, graph, side = full(1), full(1), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            y.add_(1)
        x.add_(1)
        torch.cuda.current_stream().wait_stream(side)
        x.mul_(y)
    for want in (4, 15):
        graph.replay()
        assert (x.cpu() == want).all()


def captured(body: Callable[[], object]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph


def on_a_stream_that_does_not_come_back(x: Tensor) -> None:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x.add_(1)


def waiting_for_what_is_no_part_of_it(x: Tensor) -> None:
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        x.fill_(1)
    torch.cuda.current_stream().wait_stream(other)


FORBIDDEN: dict[str, Callable[[Tensor], object]] = {
    "a_copy_to_the_host": Tensor.cpu,
    "a_value": Tensor.item,
    "waiting_for_the_gpu": lambda x: torch.cuda.synchronize(),
    "waiting_for_the_stream": lambda x: torch.cuda.current_stream().synchronize(),
    "waiting_for_what_is_no_part_of_it": waiting_for_what_is_no_part_of_it,
    "a_stream_that_does_not_come_back": on_a_stream_that_does_not_come_back,
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_a_capture_forbids_is_refused(name: str) -> None:
    x = torch.ones(1, device="cuda")
    with pytest.raises(RuntimeError, match="CUDA error"):
        captured(lambda: [x.add_(1), FORBIDDEN[name](x)])
    torch.cuda.synchronize()
    captured(lambda: x.fill_(5)).replay()
    assert x.item() == 5
