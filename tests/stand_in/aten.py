"""PyTorch's own operators on the stand-in's memory, computed by their CPU kernels as work on a stream.

The stand-in's memory is the host's: a tensor there has a twin on the CPU, at the same address.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_flatten, tree_map

from .device import StandIn

# what PyTorch does to a tensor without its memory, or to memory through the stand-in's runtime
_AS_THEY_ARE = {
    "as_strided", "empty", "empty_strided", "is_set_to", "record_stream", "resize_", "set_", "unfold", "view",
    "_efficientzerotensor", "_pin_memory", "_record_stream", "_resize_output_", "_reshape_alias",
    "_sparse_coo_tensor_with_dims", "is_pinned", "_copy_from_and_resize", "view_as_real", "view_as_complex",
}  # fmt: skip
_OF_ALL_DEVICES = ["aten::copy_", "aten::convolution"]  # kernels that ask for the device's own
_ANSWERS = {"_local_scalar_dense", "equal"}


def twin(tensor: Tensor) -> Tensor:
    """The same memory as a tensor on the CPU."""
    if tensor.numel() == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    held = (ctypes.c_uint8 * (span * tensor.element_size())).from_address(tensor.data_ptr())
    flat = torch.frombuffer(held, dtype=torch.uint8).view(tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride())


def _generator(given: torch.Generator) -> torch.Generator:
    """One of the CPU's, seeded by where the GPU's stands, which moves on."""
    offset = given.get_offset()
    given.set_offset(offset + 4)
    return torch.Generator().manual_seed(hash((given.initial_seed(), offset)) % 2**63)


def _each(kind: Callable[[Tensor], Tensor], given: Any) -> Any:
    """Tensors on the GPU through ``kind``, and everything else as it is, but for the GPU as an argument."""

    def one(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_cuda:
            return kind(value)
        if isinstance(value, torch.device) and value.type == "cuda":
            return torch.device("cpu")
        if isinstance(value, torch.Generator) and value.device.type == "cuda":
            return _generator(value)
        return value

    return tree_map(one, given)


def _tensors(kind: Callable[[Tensor], Tensor], given: Any) -> Any:
    return tree_map(lambda value: kind(value) if isinstance(value, Tensor) else value, given)


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _like(shown: Tensor) -> Tensor:
    return torch.empty_strided(shown.shape, shown.stride(), dtype=shown.dtype, device="cuda")


class Operators:
    """Every operator that PyTorch has a CUDA kernel for, on a stand-in, for as long as this object lives."""

    def __init__(self, gpu: StandIn) -> None:
        self.gpu = gpu
        self.library = torch.library.Library("aten", "IMPL")
        for kind in ("flash", "mem_efficient", "cudnn"):  # attention by plain operators
            getattr(torch.backends.cuda, f"enable_{kind}_sdp")(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each is registered a second time: that is what is wanted
            named = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
            for name in [*_OF_ALL_DEVICES, *named]:
                space, _, operator = name.partition("::")
                packet, _, overload = operator.partition(".")
                if space == "aten" and packet not in _AS_THEY_ARE:
                    op = getattr(getattr(torch.ops.aten, packet), overload or "default")
                    self.library.impl(operator, self._kernel(op, packet), "CUDA")

    def _kernel(self, op: OpOverload, packet: str) -> Callable[..., Any]:
        if packet == "copy_":
            return self._copy
        run = self._answer if packet in _ANSWERS else self._written if op._schema.is_mutable else self._made
        kinds = [str(argument.type) for argument in op._schema.arguments]

        def kernel(*args: Any, **kwargs: Any) -> Any:
            # a number for a tensor comes as the number that it is
            numbers = (isinstance(value, (bool, int, float)) and kind == "Tensor" for value, kind in zip(args, kinds))
            return run(op, [torch.tensor(a) if number else a for a, number in zip(args, numbers)], kwargs)

        return kernel

    def _stream(self) -> int:
        return torch.cuda.current_stream().cuda_stream

    def _copy(self, into: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        def later(tensor: Tensor) -> bool:
            return tensor.is_cuda or (non_blocking and tensor.is_pinned())

        to, held = (twin(each) if each.is_cuda else each for each in (into, source))
        if later(into):
            held = held if later(source) else held.clone()
            self.gpu.enqueue(lambda: to.copy_(held), self._stream())
        else:
            self.gpu.synchronise(self._stream())
            to.copy_(held)
        return into

    def _answer(self, op: OpOverload, args: Any, kwargs: Any) -> Any:
        self.gpu.synchronise(self._stream())
        return op(*_each(twin, args), **_each(twin, kwargs))

    def _written(self, op: OpOverload, args: Any, kwargs: Any) -> Any:
        arguments = op._schema.arguments
        given = {argument.name: value for argument, value in zip(arguments, args)} | kwargs
        outputs = [given[argument.name] for argument in arguments if argument.is_write]
        if any(argument.is_out for argument in arguments):
            shown = tree_flatten(op(*_each(_on_meta, args), **_each(_on_meta, kwargs)))[0]
            for output, like in zip(tree_flatten(outputs)[0], shown):
                if output.shape != like.shape:
                    output.resize_(like.shape).as_strided_(like.shape, like.stride())
        there_args, there_kwargs = _each(twin, args), _each(twin, kwargs)
        self.gpu.enqueue(lambda: op(*there_args, **there_kwargs), self._stream())
        count = len(op._schema.returns)
        return None if count == 0 else outputs[0] if count == 1 else tuple(outputs)

    def _made(self, op: OpOverload, args: Any, kwargs: Any) -> Any:
        there_args, there_kwargs = _each(twin, args), _each(twin, kwargs)
        if torch.Tag.dynamic_output_shape in op.tags:  # it depends on what is in memory
            self.gpu.synchronise(self._stream())
            return _tensors(lambda value: value.cuda(), op(*there_args, **there_kwargs))
        outputs = _tensors(_like, op(*_each(_on_meta, args), **_each(_on_meta, kwargs)))
        twins = [twin(each) for each in tree_flatten(outputs)[0] if isinstance(each, Tensor)]

        def work() -> None:
            results = [each for each in tree_flatten(op(*there_args, **there_kwargs))[0] if isinstance(each, Tensor)]
            for to, result in zip(twins, results, strict=True):
                to.copy_(result)

        self.gpu.enqueue(work, self._stream())
        return outputs
