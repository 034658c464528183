"""Where threads meet: barriers, fences, and what a warp does together."""

from __future__ import annotations

import numpy as np

from .machine import GONE, READY, WAITING, Array, Block, MBarrier, Operation, translates
from .memory import Fault
from .parse import Instruction


@translates("bar", "barrier")
def _barrier(block: Block, given: Instruction) -> Operation:
    if "warp" in given.parts:
        return _nothing
    arrives_only = "arrive" in given.parts
    identity = block.source(given.operands[0], "u32") if given.operands else None
    count = block.source(given.operands[1], "u32") if len(given.operands) > 1 else None

    def arrive(block: Block, lanes: Array) -> None:
        block.warps(lanes)
        keys = identity(lanes) if identity else np.zeros(len(lanes), np.uint32)
        for key in np.unique(keys).tolist():
            here = lanes[keys == key]
            wanted = int(count(here)[0]) if count else block.threads
            block.named.setdefault(key, []).append((here, wanted))
            if not arrives_only:
                block.state[here] = WAITING
            met = block.named[key]
            arrived = sum(len(threads) for threads, _ in met)
            if arrived > wanted or len({want for _, want in met}) > 1:
                raise Fault(f"{arrived} threads at barrier {key}, which is for {sorted({want for _, want in met})}")
            if arrived == wanted:
                together = np.concatenate([threads for threads, _ in block.named.pop(key)])
                block.state[together] = READY
                block.shared.met(together)

    return arrive


@translates("ret", "exit")
def _return(block: Block, given: Instruction) -> Operation:
    def leave(block: Block, lanes: Array) -> None:
        block.state[lanes] = GONE

    return leave


@translates("bra")
def _branch(block: Block, given: Instruction) -> Operation:
    to = block.kernel.labels[given.operands[0]]

    def branch(block: Block, lanes: Array) -> None:
        block.pc[lanes] = to

    return branch


@translates("brx")
def _branch_by_table(block: Block, given: Instruction) -> Operation:
    which = block.source(given.operands[0], "u32")
    places = np.array([block.kernel.labels[name] for name in block.kernel.tables[given.operands[1]]])

    def branch(block: Block, lanes: Array) -> None:
        block.pc[lanes] = places[which(lanes)]

    return branch


def _nothing(block: Block, lanes: Array) -> None:
    pass


@translates("griddepcontrol")
def _launches(block: Block, given: Instruction) -> Operation:
    """Programmatic dependent launch: wait for the launch ahead, and let the next one begin."""

    def wait(block: Block, lanes: Array) -> None:
        block.waited[lanes] = True

    def launch_dependents(block: Block, lanes: Array) -> None:
        if not block.waited[lanes].all():
            raise Fault("lets the next launch begin before it has waited itself: that one waits for this one alone")

    return wait if "wait" in given.parts else launch_dependents


@translates("setmaxnreg", "membar")
def _hint(block: Block, given: Instruction) -> Operation:
    return _nothing


@translates("fence")
def _fence(block: Block, given: Instruction) -> Operation:
    if "proxy" in given.parts and "async" in "".join(given.parts):
        return lambda block, lanes: block.shared.publish(lanes)
    return _nothing


@translates("mbarrier")
def _mbarrier(block: Block, given: Instruction) -> Operation:
    if "init" in given.parts:
        where, count = block.address(given.operands[0]), block.source(given.operands[1], "u32")

        def init(block: Block, lanes: Array) -> None:
            for key, expected in zip(where(lanes).tolist(), count(lanes).tolist()):
                if key % 8:
                    raise Fault(f"a barrier at {key:#x}, which is no multiple of 8")
                block.barriers[key] = MBarrier(expected, expected)

        return init
    if "arrive" in given.parts:
        where = block.address(given.operands[1])
        bytes_ = block.source(given.operands[2], "u32") if "expect_tx" in given.parts else None

        def arrive(block: Block, lanes: Array) -> None:
            expected = bytes_(lanes) if bytes_ else np.zeros(len(lanes), np.uint32)
            for key, more in zip(where(lanes).tolist(), expected.tolist()):
                barrier = _held(block, key)
                barrier.bytes += more
                barrier.pending -= 1
                if barrier.pending < 0:
                    raise Fault(f"more than {barrier.expected} arrivals in one phase")
                barrier.settle()

        return arrive
    if "try_wait" in given.parts or "test_wait" in given.parts:
        if "parity" not in given.parts:
            raise Fault("waiting for a state token is not known here")
        done, where = block.target(given.operands[0]), block.address(given.operands[1])
        parity = block.source(given.operands[2], "u32")

        def wait(block: Block, lanes: Array) -> None:
            keys = where(lanes).tolist()
            phases = [_held(block, key).phase for key in keys]
            ended = np.array(phases) != parity(lanes)
            done(lanes, ended)
            for key in {key for key, end in zip(keys, ended) if not end}:
                _let_one_land(block, key)  # whoever asks again will find it

        return wait
    raise Fault(f"an mbarrier operation that this machine does not know: {given.text}")


def _held(block: Block, key: int) -> MBarrier:
    if key not in block.barriers:
        raise Fault(f"no barrier was made at {key:#x}")
    return block.barriers[key]


def _let_one_land(block: Block, key: int) -> None:
    for i, (own, land) in enumerate(block.bulk):
        if own == key:
            del block.bulk[i]
            land()
            return


@translates("shfl")
def _shuffle(block: Block, given: Instruction) -> Operation:
    how = given.parts[2]
    first, _, second = given.operands[0].partition("|")
    to, found = block.target(first), block.target(second or "_")
    value, by, clamp = (block.source(o, "u32") for o in given.operands[1:4])

    def shuffle(block: Block, lanes: Array) -> None:
        block.warps(lanes)
        lane = lanes % 32
        segment = (clamp(lanes) >> np.uint32(8)) & np.uint32(31)
        limit = clamp(lanes) & np.uint32(31)
        lowest = (lane & segment).astype(np.int64)
        highest = (lowest | (limit & ~segment)).astype(np.int64)
        offset = by(lanes).astype(np.int64)
        if how == "up":
            source, inside = lane - offset, lane - offset >= highest
        elif how == "down":
            source, inside = lane + offset, lane + offset <= highest
        elif how == "bfly":
            source, inside = lane ^ offset, (lane ^ offset) <= highest
        else:
            source = lowest | (offset & ~segment.astype(np.int64) & 31)
            inside = source <= highest
        source = np.where(inside, source, lane)
        values = value(lanes).reshape(-1, 32)
        to(lanes, np.take_along_axis(values, source.reshape(-1, 32), 1).ravel())
        found(lanes, inside)

    return shuffle


@translates("redux")
def _reduce(block: Block, given: Instruction) -> Operation:
    function = {"add": np.sum, "max": np.max, "min": np.min}[given.parts[2]]
    kind = given.parts[-1]
    to, value = block.target(given.operands[0]), block.source(given.operands[1], kind)

    def reduce(block: Block, lanes: Array) -> None:
        block.warps(lanes)
        values = value(lanes).reshape(-1, 32)
        to(lanes, np.repeat(function(values, axis=1).astype(values.dtype), 32))

    return reduce


@translates("vote")
def _vote(block: Block, given: Instruction) -> Operation:
    function = {"any": np.any, "all": np.all}[given.parts[2]]
    to, value = block.target(given.operands[0]), block.source(given.operands[1], "pred")

    def vote(block: Block, lanes: Array) -> None:
        block.warps(lanes)
        to(lanes, np.repeat(function(value(lanes).reshape(-1, 32), axis=1), 32))

    return vote
