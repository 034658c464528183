"""The demo's second half: a published pruned shape against its dense original, one image at a time."""

from __future__ import annotations

from typing import Any

import torch

from .. import shapes
from ..models.vit import PrunedViT
from ..runtime import Runtime
from ._measure import interleaved_ms
from ._output import Output

SHAPE, DENSE = "snp_deit_small", "deit_small_patch16_224"


def run_latency(output: Output, rounds: int, seed: int) -> dict[str, Any]:
    """Median milliseconds of dense eager, pruned eager and pruned in the runtime, interleaved, on the CPU."""
    import timm

    torch.manual_seed(seed)  # time does not depend on the weights: random ones do
    spec = shapes.get(SHAPE)
    dense_spec = shapes.get(shapes.dense_of(SHAPE))
    dense = timm.create_model(DENSE).eval()
    pruned = PrunedViT(spec).eval()
    runtime = Runtime(pruned, device="cpu")
    image = torch.randn(1, spec.in_chans, *spec.img_size)
    with output.bar(f"timing {SHAPE}", total=rounds) as bar:
        times = interleaved_ms(
            {
                "dense_eager_ms": lambda: dense(image),
                "pruned_eager_ms": lambda: pruned(image),
                "pruned_runtime_ms": lambda: runtime(image),
            },
            rounds=rounds,
            warmup=min(3, rounds),
            tick=bar.advance,
        )
    return {"macs_ratio": spec.macs() / dense_spec.macs(), **times}
