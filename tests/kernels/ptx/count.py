"""``python -m tests.kernels.ptx.count wgmma 153 383``: the PTX instructions that a CUDA MLP's warps issue, by kind."""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path

import torch

from prunevit_kernels._aot import stand_in_target
from prunevit_kernels._configs import CUDA_MLP_KERNELS
from tests.kernels.cuda.emulation import ONE_SM, draw

from .extension import EmulatedExtension


def count(extension: EmulatedExtension, kernel: str, embed: int, hidden: int, rows: int) -> Counter[str]:
    """Of one launch in bf16 on one multiprocessor, by the first word of the opcode."""
    extension.be(ONE_SM)
    x = torch.full((1, rows, -(-embed // 8) * 8), 3.0, dtype=torch.bfloat16)[..., :embed]
    mlp = extension.pack(draw(embed, hidden), stand_in_target(x.dtype))
    bound, _, held = mlp._bound(x, mlp._planned(x, kernel)).args
    return extension.launch(bound, held)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.ptx.count", description=__doc__)
    parser.add_argument("kernel", choices=CUDA_MLP_KERNELS)
    parser.add_argument("embed", type=int)
    parser.add_argument("hidden", type=int)
    parser.add_argument("--rows", type=int, default=128)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kinds = count(EmulatedExtension(Path(folder)), given.kernel, given.embed, given.hidden, given.rows)
    for kind, issued in kinds.most_common():
        print(f"{issued:9,} {kind}")
    print(f"{sum(kinds.values()) - kinds['mov']:9,} in all, moves apart")


if __name__ == "__main__":
    main()
