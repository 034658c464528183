"""The machine itself: it computes what PTX says, and stops for what a GPU would get wrong."""

from __future__ import annotations

import pytest
import torch

from .launch import run
from .machine import Timing
from .memory import DeviceMemory, Fault

LATE, EARLY = Timing(late_copies=True, late_products=True), Timing()


def kernel(body: str) -> str:
    """A module with one kernel: two pointers, 1 KB of shared memory, registers to spare."""
    return f"""
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 memory[];
.visible .entry k(.param .u64 k_0, .param .u64 k_1)
{{
    .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<99>; .reg .b64 %rd<19>;
    ld.param.b64 %rd1, [k_0];
    ld.param.b64 %rd2, [k_1];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd3, %r1, 16;
    shl.b32 %r2, %r1, 4;
    mov.b32 %r3, memory;
    add.s32 %r4, %r3, %r2;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    {body}
    ret;
}}
"""


def launch(body: str, timing: Timing = LATE, threads: int = 32, given: torch.Tensor | None = None) -> torch.Tensor:
    """16 bytes in and 16 bytes out a thread."""
    source = torch.arange(threads * 4, dtype=torch.int32) if given is None else given
    out = torch.zeros(threads * 4, dtype=torch.int32)
    memory = DeviceMemory()
    memory.add("source", source)
    memory.add("out", out)
    run(
        kernel(body), "k", [source.data_ptr(), out.data_ptr()], memory,
        grid=(1, 1, 1), threads=threads, shared_bytes=1024, timing=timing,
    )  # fmt: skip
    return out


COPY = "cp.async.cg.shared.global [%r4], [%rd4], 16; cp.async.commit_group;"
FETCH = "ld.shared.v4.b32 {%r5, %r6, %r7, %r8}, [%r4]; st.global.v4.b32 [%rd5], {%r5, %r6, %r7, %r8};"


@pytest.mark.parametrize("timing", [EARLY, LATE, Timing(late_copies=True, late_products=True, order=1)], ids=str)
def test_a_copy_that_is_waited_for_is_there(timing: Timing) -> None:
    assert launch(COPY + "cp.async.wait_group 0;" + FETCH, timing).tolist() == list(range(128))


def test_a_copy_that_is_not_waited_for_is_not_there_when_late() -> None:
    assert launch(COPY + FETCH, EARLY).tolist() == list(range(128))
    assert launch(COPY + FETCH, LATE).tolist() == [-1] * 128  # shared memory begins as NaN


def test_only_so_many_groups_may_be_pending() -> None:
    second = COPY.replace("[%r4]", "[%r4 + 512]").replace("[%rd4]", "[%rd4 + 0]")
    both = COPY + second + "cp.async.wait_group 1;"
    assert launch(both + FETCH).tolist() == list(range(128))
    assert launch(both + FETCH.replace("[%r4]", "[%r4 + 512]")).tolist() == [-1] * 128


@pytest.mark.parametrize(
    ("body", "fault"),
    {
        "past_the_end": ("ld.global.b32 %r5, [%rd4 + 512];", "no allocation|past the end"),
        "misaligned": ("ld.global.v4.b32 {%r5, %r6, %r7, %r8}, [%rd4 + 8];", "16 bytes .* no multiple"),
        "past_shared": ("st.shared.b32 [%r4 + 1024], %r1;", "4 bytes of shared memory"),
        "below_shared": ("st.shared.b32 [%r4 + -1024], %r1;", "shared memory"),
        "half_a_warp": (
            "setp.lt.u32 %p1, %r1, 16; @%p1 bra JOIN; shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1; JOIN:",
            "not together",
        ),
        "too_few_at_a_barrier": ("bar.sync 1, 64;", "deadlock"),
        "too_many_at_a_barrier": ("bar.sync 1, 16;", "32 threads at barrier 1"),
        "no_such_barrier": ("mbarrier.arrive.shared::cta.b64 _, [%r3];", "no barrier was made"),
        "too_many_arrivals": (
            "mbarrier.init.shared::cta.b64 [%r3], 31; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 16; "
            "mbarrier.arrive.shared::cta.b64 _, [%r3];",
            "more than 31 arrivals|no end",
        ),
        "unknown": ("popc.b32 %r5, %r1;", "does not know: popc.b32"),
    }.values(),
)
def test_a_fault_is_named(body: str, fault: str) -> None:
    with pytest.raises(Fault, match=fault):
        launch(body)


WAITS, NEXT = "griddepcontrol.wait;", "griddepcontrol.launch_dependents;"
LOAD, STORE = "ld.global.b32 %r5, [%rd4];", "st.global.b32 [%rd5], %r1;"


@pytest.mark.parametrize(
    ("body", "fault"),
    {
        "a_load": (LOAD + WAITS, r"read before griddepcontrol\.wait"),
        "a_copy": (COPY + WAITS + "cp.async.wait_group 0;", r"read before griddepcontrol\.wait"),
        "a_store": (STORE + WAITS, r"written before griddepcontrol\.wait"),
        "by_half_a_warp": ("setp.lt.u32 %p1, %r1, 16; @%p1 " + WAITS + STORE, r"written before griddepcontrol\.wait"),
        "the_next_launch": (NEXT + WAITS, "lets the next launch begin before it has waited"),
    }.values(),
)
def test_what_may_not_come_before_waiting_for_the_launch_ahead(body: str, fault: str) -> None:
    with pytest.raises(Fault, match=fault):
        launch(body)
    launch(WAITS + body.replace(WAITS, ""))


# one tile of 64 rows of 128 bytes, all ones in bf16, multiplied by itself: every product of 16 columns is 16
ONES = "".join(f"st.shared.b32 [%r9 + {4 * i}], 0x3F803F80;" for i in range(32))
FILL = "mul.lo.s32 %r9, %r1, 64; add.s32 %r9, %r9, %r3;" + ONES[: ONES.index("[%r9 + 64]") - len("st.shared.b32 ")]
DESCRIBE = "cvt.u64.u32 %rd6, %r3; shr.u64 %rd6, %rd6, 4; or.b64 %rd6, %rd6, 0x4000004000010000;"
SUMS = "{%r10, %r11, %r12, %r13}"
PRODUCT = (
    "wgmma.fence.sync.aligned;"
    f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {SUMS}, %rd6, %rd6, 0, 1, 1, 0, 0;"
    "wgmma.commit_group.sync.aligned;"
)
WAIT = "wgmma.wait_group.sync.aligned 0;"
KEEP = f"st.global.v4.b32 [%rd5], {SUMS};"
FENCE, BARRIER = "fence.proxy.async.shared::cta;", "bar.sync 0;"


def product(body: str, timing: Timing = LATE) -> torch.Tensor:
    source = torch.zeros(512, dtype=torch.int32)
    out = torch.zeros(512, dtype=torch.int32)
    memory = DeviceMemory()
    memory.add("source", source)
    memory.add("out", out)
    text = kernel(FILL + body)
    values = [source.data_ptr(), out.data_ptr()]
    run(text, "k", values, memory, grid=(1, 1, 1), threads=128, shared_bytes=8192, timing=timing)
    return out.view(torch.float32)


@pytest.mark.parametrize("timing", [EARLY, LATE, Timing(late_copies=True, late_products=True, order=1)], ids=str)
@pytest.mark.parametrize("fenced", [FENCE + BARRIER, BARRIER + FENCE], ids=["by_the_writer", "by_the_reader"])
def test_wgmma_multiplies_what_was_published(timing: Timing, fenced: str) -> None:
    assert (product(fenced + DESCRIBE + PRODUCT + WAIT + KEEP, timing) == 16).all()


def test_wgmma_does_not_see_what_was_not_published() -> None:
    with pytest.raises(Fault, match=r"without fence\.proxy\.async"):
        product(BARRIER + DESCRIBE + PRODUCT + WAIT + KEEP)


def test_sums_are_there_only_when_they_were_waited_for() -> None:
    assert product(FENCE + BARRIER + DESCRIBE + PRODUCT + KEEP + WAIT).isnan().all()


def test_products_must_be_waited_for() -> None:
    with pytest.raises(Fault, match="before its asynchronous work"):
        product(FENCE + BARRIER + DESCRIBE + PRODUCT)


@pytest.mark.parametrize("timing", [EARLY, LATE], ids=str)
def test_a_bulk_copy_counts_its_bytes(timing: Timing) -> None:
    """One thread copies 512 bytes; all wait for the barrier that counts them."""
    body = """
    setp.ne.u32 %p1, %r1, 0;
    @%p1 bra GO;
    mbarrier.init.shared::cta.b64 [%r3 + 768], 1;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3 + 768], 512;
    mov.u32 %r20, 512;
    add.s32 %r21, %r3, 768;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%rd1], %r20, [%r21];
    GO:
    bar.sync 0;
    WAIT:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r3 + 768], 0;
    @!%p2 bra WAIT;
    """
    assert launch(body + FETCH, timing).tolist() == list(range(128))
