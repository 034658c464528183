"""What nvcc made of the kernels, for GPUs that are not there: registers, spills, shared memory, instructions.

The objects are the ones that the extension is linked from, compiled anew where a source is newer than they are.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import triton

import setup_cuda

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# two blocks an SM: 65536 registers over 2 · 256 threads
WGMMA = ("fused_wgmma", "wgmma_expand", "wgmma_contract")
TWO_BLOCKS = ("fused_mma<2, 3>", "expand<2>", "expand<3>", "contract<2>", "contract<4>")


@dataclass
class Code:
    """One kernel on one GPU generation."""

    registers: int
    stack: int
    instructions: list[str] = field(default_factory=list)
    """Their names, in the order in which they lie."""


def short_name(mangled: str) -> str:
    """``fused_mma<2, 3> bf16`` of the mangled entry."""
    name, arguments = re.search(r"mlp\d+([a-z_]+?)I(.*?)EvNS0_9Arguments", mangled).groups()  # type: ignore[union-attr]
    dtype = "bf16" if "DtypeE1" in arguments else "fp16"
    numbers = ", ".join(re.findall(r"Li(\d+)", arguments))
    return f"{name}<{numbers}> {dtype}" if numbers else f"{name} {dtype}"


def dump(option: str, path: Path) -> str:
    return subprocess.run([TOOL, option, path], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def code() -> dict[tuple[str, str], Code]:
    if setup_cuda.find_nvcc() is None:
        pytest.skip("no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda: there is no machine code to look at")
    found: dict[tuple[str, str], Code] = {}
    for path in setup_cuda.compile_objects():
        arch, name = "", ""
        for line in dump("-res-usage", path).splitlines():
            if "arch = " in line:
                arch = line.split("= ")[1].strip()
            elif "Function " in line:
                name = short_name(line)
            elif name and "REG:" in line:
                numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
                found[arch, name] = Code(numbers["REG"], numbers["STACK"])
                name = ""
        for line in dump("-sass", path).splitlines():
            if "arch = " in line:
                arch = line.split("= ")[1].strip()
            elif "Function : " in line:
                name = short_name(line)
            elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", line):
                found[arch, name].instructions.append(match[1])
    return found


@pytest.fixture(scope="module")
def serialised(code: dict[tuple[str, str], Code]) -> set[str]:
    """The kernels whose products ptxas says it makes wait for one another."""
    said = "".join(path.with_suffix(".log").read_text() for path in setup_cuda.compile_objects())
    return {short_name(line) for line in said.splitlines() if "are serialized" in line}


def kernels(code: dict[tuple[str, str], Code], prefix: str, arch: str | None = None) -> dict[tuple[str, str], Code]:
    chosen = {key: value for key, value in code.items() if key[1].startswith(prefix) and arch in (None, key[0])}
    assert chosen, f"no kernel {prefix} for {arch}"
    return chosen


def count(code: Code, *names: str) -> int:
    return sum(code.instructions.count(name) for name in names)


def test_every_kernel_is_there_for_every_generation(code: dict[tuple[str, str], Code]) -> None:
    shared = 2 * (5 + 1 + 2 + 2)  # fused_mma, reduce_splits, expand, contract, in both dtypes
    assert len([key for key in code if key[0] == "sm_80"]) == shared
    assert len([key for key in code if key[0] == "sm_90a"]) == shared + 2 * (5 + 1 + 5)  # fused_wgmma, expand, contract


def test_nothing_spills(code: dict[tuple[str, str], Code]) -> None:
    spilled = {key: made for key, made in code.items() if made.stack or count(made, "LDL", "STL")}
    assert spilled == {}


def test_registers_leave_room_for_the_blocks_that_the_plan_counts_on(code: dict[tuple[str, str], Code]) -> None:
    for prefix in TWO_BLOCKS:
        for key, made in kernels(code, prefix).items():
            assert made.registers <= 128, key
    # setmaxnreg hands all of 384 · 168 out again, as 128 · 24 + 256 · 240 and 128 · 40 + 256 · 232: of fewer, it would
    # wait for ever
    assert all(made.registers == 168 for prefix in WGMMA for made in kernels(code, prefix).values())


@pytest.mark.parametrize("prefix", ["fused_mma", "expand", "contract"])
def test_tensor_cores_async_copies_and_matrix_loads(code: dict[tuple[str, str], Code], prefix: str) -> None:
    for key, made in kernels(code, prefix).items():
        for name in ("HMMA", "LDGSTS", "LDSM"):
            assert count(made, name) > 0, (key, name)


@pytest.mark.parametrize("prefix", WGMMA)
def test_wgmma_kernels_run_on_hoppers_own_instructions(code: dict[tuple[str, str], Code], prefix: str) -> None:
    for key, made in kernels(code, prefix, "sm_90a").items():
        for name in ("HGMMA", "UBLKCP", "USETMAXREG"):
            assert count(made, name) > 0, (key, name)
        assert count(made, "HMMA") == 0, key
        rows_of_x = prefix != "wgmma_contract"  # they are copied as they are, sixteen bytes at a time
        assert (count(made, "LDGSTS") > 0) == rows_of_x, key


def test_products_stay_in_flight(serialised: set[str]) -> None:
    """None waits for the one before it."""
    assert serialised == set()


@pytest.mark.parametrize("prefix", ["fused_wgmma", "wgmma_expand"])
def test_descriptors_stay_in_uniform_registers(code: dict[tuple[str, str], Code], prefix: str) -> None:
    """Products take them from there: between the first and the last, R2UR brings none from a thread's registers."""
    for key, made in kernels(code, prefix, "sm_90a").items():
        at = [i for i, name in enumerate(made.instructions) if name == "HGMMA"]
        assert "R2UR" not in made.instructions[at[0] : at[-1]], key


def test_launches_may_overlap(code: dict[tuple[str, str], Code]) -> None:
    """Before the launch ahead has ended, nothing is read but weights; the next one begins after that."""
    for key, made in code.items():
        overlaps = key[0] == "sm_90a"
        assert (count(made, "ACQBULK"), count(made, "PREEXIT")) == (overlaps, overlaps), key
        if overlaps:
            before = set(made.instructions[: made.instructions.index("ACQBULK")])  # which waits for that launch
            weights = {"LDGSTS"} if key[1].startswith("expand") else set[str]()
            assert before & {"LDG", "LD", "STG", "ST", "LDGSTS", "PREEXIT"} == weights, key
