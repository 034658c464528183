"""What a runtime's images must be. Checked once, at the door: nothing behind it checks again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, expect
from ..spec import ViTSpec
from .backend import is_count


def size_of(img_size: Any, spec: ViTSpec) -> tuple[int, int]:
    """Height and width as they were given, or the spec's."""
    if img_size is None:
        return spec.img_size
    fits = isinstance(img_size, Sequence) and len(img_size) == 2 and all(map(is_count, img_size))
    expect(fits, InputError, "img_size as two whole numbers of pixels, (height, width)", got=repr(img_size))
    return int(img_size[0]), int(img_size[1])


class Door:
    """Lets in images that a model can run on, padded to whole patches where the spec says so."""

    def __init__(self, spec: ViTSpec, device: torch.device, dtype: torch.dtype) -> None:
        self.spec, self.device, self.dtype = spec, device, dtype
        self._last: tuple[object, ...] = ()
        # in a class token that attends to nothing no pixel ever arrives
        attends = any(block.qk_dims for block in spec.blocks)
        self._pixels_arrive = attends or spec.global_pool != "token"

    def admit(self, images: Tensor) -> Tensor:
        """The images as the engine takes them, or an InputError that says what was expected and what came."""
        # what differs from call to call is mostly the values: a layout that came in last time needs no second look
        known = isinstance(images, Tensor) and (images.shape, images.dtype, images.device) == self._last
        if not known:
            self._expect(images)
            self._last = (images.shape, images.dtype, images.device)
        # the kernels read NCHW: channels_last and other views are copied, as PyTorch's own ops would
        return self._pad(images.detach().to(self.dtype).contiguous())

    def refuse_nonfinite(self, images: Tensor, out: Tensor) -> None:
        """Raise InputError if there is a NaN or infinity in the images that made ``out``.

        One pixel that is no number makes a whole output none, and a thousand logits are read faster than the pixels of
        an image: those are read only where the output tells something.
        """
        whole = all(size % patch == 0 for size, patch in zip(images.shape[2:], self.spec.patch_size))
        if whole and self._pixels_arrive and _finite(out):
            return
        expect(_finite(images), InputError, "finite pixel values", got="NaN or infinity in images")

    def _expect(self, images: Tensor) -> None:
        spec = self.spec
        expect(isinstance(images, Tensor), InputError, "images as a tensor [B, C, H, W]", got=type(images).__name__)
        expect(images.dim() == 4, InputError, "images [B, C, H, W]", got=f"shape {tuple(images.shape)}")
        expect(images.shape[0] >= 1, InputError, "at least one image", got=f"shape {tuple(images.shape)}")
        expect(images.shape[1] == spec.in_chans, InputError, f"{spec.in_chans} channels", got=images.shape[1])
        size = (images.shape[2], images.shape[3])
        if spec.dynamic_img_size:
            steps = (1, 1) if spec.dynamic_img_pad else spec.patch_size  # an image is padded to whole patches
            fits = all(s >= step and s % step == 0 for s, step in zip(size, steps))
            sides = "of at least one pixel" if spec.dynamic_img_pad else f"that are multiples of the patch size {steps}"
            expect(fits, InputError, f"sides {sides}", got=size)
        else:
            expect(
                size == spec.img_size, InputError, f"images of {spec.img_size[0]} × {spec.img_size[1]} pixels", got=size
            )
        same = images.device.type == self.device.type and self.device.index in (None, images.device.index)
        expect(same, InputError, f"images on {self.device} (use .to)", got=images.device)
        accepted = {self.dtype, torch.float32}
        wanted = " or ".join(sorted(str(d).removeprefix("torch.") for d in accepted))
        expect(images.dtype in accepted, InputError, f"{wanted} images", got=images.dtype)

    def _pad(self, images: Tensor) -> Tensor:
        if not self.spec.dynamic_img_pad:
            return images
        (p, q), (h, w) = self.spec.patch_size, images.shape[2:]
        return F.pad(images, (0, -w % q, 0, -h % p)) if h % p or w % q else images


def _finite(values: Tensor) -> bool:
    if values.device.type == "cpu" and values.dtype != torch.bfloat16:
        # NumPy stays on this thread: PyTorch's would go on spinning beside the kernels' own
        return bool(np.isfinite(values.detach().numpy()).all())
    return bool(values.isfinite().all())
