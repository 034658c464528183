"""Runtime: a pruned model, executed in exactly its shape."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from prunevit_kernels import BackendName

from .. import checkpoint
from ..errors import InputError, expect
from ..models.vit import PrunedViT
from ..spec import ViTSpec
from .backend import choose_target, count, tuned
from .door import Door, size_of
from .engine import Engine
from .graphs import recorder_for
from .plan import Plan, make_plan
from .predict import ImageLike, Prediction, Predictor

if TYPE_CHECKING:
    from .explain import Explanation


class Runtime:
    """Runs a checkpoint directory, a :class:`PrunedViT`, or a timm ViT.

    ``device``: cuda where there is one, else cpu. ``dtype``: bf16 or fp16 on a GPU (bf16), fp32 on a CPU. ``backend``:
    ``auto``, ``cuda`` (Triton and CUDA), ``cpu`` (C++) or ``torch`` (the reference ops, any device and dtype).
    ``threads``: of the cpu backend, all cores by default. ``check_nan``: refuse images with NaN or infinity; on by
    default on a CPU, off on a GPU, where looking costs a synchronisation. ``max_programs``: how many input shapes stay
    prepared. ``cuda_graphs``: on a GPU, replay each shape as one graph from its second call on. ``tuning``: a file of
    tile sizes by GPU, the checkpoint's own tuning.json by default; :class:`UntunedMachine` warns where it has none.

    The weights are copied and laid out here: later changes to the model do not reach the runtime. Calls from several
    threads are safe, and so are those of a child after a fork. A runtime can be copied and pickled.

    Raises :class:`CheckpointError`, :class:`SpecError`, :class:`UnsupportedModel`; at calls :class:`InputError`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        backend: BackendName | Literal["auto"] = "auto",
        threads: int | None = None,
        check_nan: bool | None = None,
        max_programs: int = 8,
        cuda_graphs: bool = True,
        tuning: str | os.PathLike[str] | None = None,
    ) -> None:
        max_programs = count(max_programs, "max_programs")
        source = checkpoint.model_of(model)
        self.spec = source.spec
        self.target = tuned(choose_target(device, dtype, backend, threads), _tuning_file(model, tuning))
        self.check_nan = self.target.device.type == "cpu" if check_nan is None else check_nan
        # a copy, so that training the model further cannot reach what is planned for another image size later
        self._tensors = {name: tensor.detach().cpu().clone() for name, tensor in source.state_dict().items()}
        self.name, self.dense_spec = _name_of(model, source), _dense_spec(source)
        self._door = Door(self.spec, self.target.device, self.target.dtype)
        self._max_programs, self._cuda_graphs = max_programs, cuda_graphs
        self._engine = self._new_engine()
        self._predictor = Predictor(source.pretrained_cfg, self.spec)

    def _new_engine(self) -> Engine:
        # it does not know the runtime: in a cycle, threads and GPU memory would stay until Python looks for cycles
        plan_of = partial(make_plan, self.spec, self._tensors, self.target)
        return Engine(plan_of, self.target, self._max_programs, recorder_for(self.target, self._cuda_graphs))

    def __getstate__(self) -> dict[str, Any]:
        """A copy, here or in another process, packs for itself: what is packed and bound holds addresses."""
        return {name: value for name, value in self.__dict__.items() if name != "_engine"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._engine = self._new_engine()

    def plan(self, img_size: tuple[int, int] | None = None) -> Plan:
        """The steps that a call runs, at the spec's image size or another."""
        return make_plan(self.spec, self._tensors, self.target, size_of(img_size, self.spec))

    @property
    def backend(self) -> BackendName:
        return self.target.backend

    @property
    def device(self) -> torch.device:
        return self.target.device

    @property
    def dtype(self) -> torch.dtype:
        return self.target.dtype

    def __repr__(self) -> str:
        gmacs = self.spec.macs() / 1e9
        return f"Runtime({self.spec.depth} blocks, {gmacs:.3f} GMAC, {self.backend} on {self.device}, {self.dtype})"

    def __call__(self, images: Tensor) -> Tensor:
        """images [B, C, H, W] on the runtime's device -> logits [B, classes] (features where there is no classifier).

        fp32 images are accepted by a 16-bit runtime and cast; any other difference is an :class:`InputError`.
        """
        images = self._door.admit(images)
        out = self._engine(images)
        if self.check_nan:
            self._door.refuse_nonfinite(images, out)
        return out

    def predict(
        self,
        images: ImageLike | Sequence[ImageLike],
        top_k: int = 5,
        batch_size: int = 32,
    ) -> list[list[Prediction]]:
        """The ``top_k`` classes of each image, most likely first, with the label names that timm knows.

        Images are paths or PIL images, prepared by the checkpoint's own data config (size, crop, mean, std), and read
        and run ``batch_size`` at a time.
        """
        expect(self.spec.num_classes > 0, InputError, "a model with a classifier to predict with", got="num_classes 0")
        top_k, batch_size = count(top_k, "top_k"), count(batch_size, "batch_size")
        if isinstance(images, str | os.PathLike | Image.Image):
            images = [images]
        expect(isinstance(images, Iterable), InputError, "paths or PIL images", got=images)
        several = list(images)
        expect(len(several) > 0, InputError, "at least one image", got="none")
        predictions = []
        for start in range(0, len(several), batch_size):
            batch = self._predictor.prepare(several[start : start + batch_size])
            predictions += self._predictor.top(self(batch.to(self.device)), top_k)
        return predictions

    def warmup(self, batch: int | Iterable[int] = 1, img_size: tuple[int, int] | None = None) -> Runtime:
        """Pack, plan, compile and record for one batch size or several, so that no request has to.

        Several are prepared largest first: the others then share its memory. While a GPU records, PyTorch before 2.13
        has no random numbers for other threads of the process: warm up before they begin.
        """
        given = batch if isinstance(batch, Iterable) else [batch]
        batches = sorted({count(size, "a batch") for size in given}, reverse=True)
        kept = len(batches) <= self._max_programs
        expect(kept, InputError, f"max_programs of at least {len(batches)} for as many batches", got=self._max_programs)
        height, width = size_of(img_size, self.spec)
        for size in batches:
            shape = (size, self.spec.in_chans, height, width)
            images = torch.zeros(shape, dtype=self.dtype, device=self.device)
            self._engine.warm(self._door.admit(images))
        return self

    def explain(self, batch: int = 1, rounds: int = 20, img_size: tuple[int, int] | None = None) -> Explanation:
        """Measure every step: MACs, bytes, time, achieved rate, share of the measured peak, padding, and the kernel.

        Prints as a table; ``to_json()``, ``to_html()`` and ``save_html(path)`` are its other forms. Other callers of
        this runtime wait meanwhile.
        """
        from .explain import explain

        return explain(self, batch, rounds, img_size)


def _name_of(model: str | os.PathLike[str] | nn.Module, source: PrunedViT) -> str:
    if isinstance(model, str | os.PathLike):
        return Path(model).resolve().name
    base = str(source.provenance.get("base_model", type(source).__name__))
    return f"{base}, pruned" if source.plan is not None else base


def _tuning_file(model: str | os.PathLike[str] | nn.Module, given: str | os.PathLike[str] | None) -> Path | None:
    if given is not None:
        expect(Path(given).is_file(), InputError, "a tuning file", got=given)
        return Path(given)
    if not isinstance(model, str | os.PathLike):
        return None
    beside = Path(model) / "tuning.json"
    return beside if beside.is_file() else None


def _dense_spec(source: PrunedViT) -> ViTSpec | None:
    """What the model was pruned from, as its plan has it."""
    dense = (source.plan or {}).get("dense")
    return ViTSpec.from_dict(dense) if isinstance(dense, dict) else None
