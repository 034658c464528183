"""What kernel-backed modules share: when a call runs on kernels, and what is said when it does not."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from prunevit_kernels import BackendName
from prunevit_kernels.target import BUILD_COMMAND, HALF, cpu_extension_built

from ..errors import InputError, expect
from ..models.parts import Part, kind_of, made_from_ours, own_methods, part_refusal, patch_refusal
from ._snapshot import Known

Backend = BackendName | Literal["auto"]
Check = Literal["contents", "versions"]

CPU_KERNELS = cpu_extension_built()
GRADIENTS = "gradients are on, and kernels have none (torch.no_grad or torch.inference_mode turns them off)"

_tokens = itertools.count()
_told: set[tuple[int, str]] = set()


@dataclass
class Options:
    """How modules run. The modules of one ``accelerate`` call share one object, and tell each reason once."""

    backend: Backend = "auto"
    check: Check = "contents"
    token: int = field(default_factory=lambda: next(_tokens))

    def __post_init__(self) -> None:
        backends = ("auto", "cpu", "cuda", "torch")
        expect(self.backend in backends, InputError, f"a backend among {', '.join(backends)}", got=self.backend)
        expect(self.check in ("contents", "versions"), InputError, "check contents or versions", got=self.check)
        built = CPU_KERNELS or self.backend != "cpu"
        expect(built, InputError, f"the C++ kernels (build them: {BUILD_COMMAND})", got="none built")


class KernelModule(nn.Module):
    """A module that runs on kernels where it can, and as the eager module that it extends everywhere else.

    A subclass mixes this in before the eager class, whose state and forward it shares.
    """

    kernel_options = Options()

    def refusal(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> str | None:
        """Why a call with these arguments would run on the reference path now; None if it would run on kernels."""
        raise NotImplementedError

    def _look(self) -> str | None:
        """Why kernels cannot stand for the module and its submodules, their tensors aside."""
        if made_from_ours(self):
            return f"it is a {type(self).__name__}, made from the class that accelerate gave it"
        # a forward of its own has run already, and asked for this one
        own = [name for name in own_methods(self) if name != "forward"]
        return f"{own[0]} is replaced" if own else patch_refusal(kind_of(self))

    def _own_refusal(self) -> str | None:
        """``_look``, taken once for each state of the submodules; a graph that is traced guards on them itself."""
        return self._look() if torch.compiler.is_compiling() else _refusals(self)[1]

    @property
    def _how(self) -> tuple[str, bool]:
        """The last two arguments of every op."""
        return self.kernel_options.backend, self.kernel_options.check == "versions"

    def _tell(self, reason: str) -> None:
        """Warn of a reference path, once. A training loop needs no telling that it is one."""
        if not (self.training and torch.is_grad_enabled()):
            _warn_once(self.kernel_options.token, type(self).__name__, reason)

    def _call_refusal(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> str | None:
        """What a call's own arguments ask for that no kernel does."""
        if attn_mask is not None:
            return "attn_mask is given"
        if is_causal:
            return "is_causal is set"
        if x.numel() == 0:
            return "the batch is empty"
        if type(x) is not Tensor and is_traceable_wrapper_subclass(x):
            return f"x is a {type(x).__name__}"
        if torch.is_autocast_enabled(x.device.type):
            return "autocast is on"
        if not torch.compiler.is_compiling():
            if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
                return "a torch.func transform or forward-mode gradient is active"
            if len(hooks._global_forward_hooks) or len(hooks._global_forward_pre_hooks):
                return "a hook for all modules is registered"
            if torch._C._get_tracing_state() is not None:
                return "torch.jit.trace is recording"
            if x.is_cuda and torch.cuda.is_current_stream_capturing():
                return "a CUDA graph is being captured, whose replays would not see changed weights"
        return self._device_refusal(x)

    def _device_refusal(self, x: Tensor) -> str | None:
        backend, device, dtype = self.kernel_options.backend, x.device.type, x.dtype
        if backend == "torch":
            return None
        if device == "cpu" and dtype == torch.float32 and backend != "cuda":
            return None if CPU_KERNELS else f"the C++ kernels are not built (build them: {BUILD_COMMAND})"
        if device == "cuda" and dtype in HALF and backend != "cpu":
            return None
        served = {"auto": "fp32 on a CPU, fp16 and bf16 on a GPU", "cpu": "fp32 on a CPU"}
        return f"x is {dtype} on {device}: the kernels take {served.get(backend, 'fp16 and bf16 on a GPU')}"


_refusals: Known[str | None] = Known(lambda module, _: module._look())


def parts_refusal(parts: Iterable[Part]) -> str | None:
    """Why kernels cannot stand for these submodules."""
    for part in parts:
        reason = part_refusal(part) or _drop_refusal(part)
        if reason is not None:
            return reason
    return None


def _drop_refusal(part: Part) -> str | None:
    name, module, _ = part
    rate: Any = 0.0
    if type(module) is nn.Dropout:
        rate = module.p
    elif type(module) is DropPath:
        rate = module.drop_prob
    return f"{name} drops at a rate of {rate:.3g} in training" if rate and module.training else None


PLAIN = (Tensor, nn.Parameter, nn.Buffer)


def tensors_refusal(x: Tensor, tensors: Iterable[Tensor | None]) -> str | None:
    """Why kernels cannot run on these weights."""
    dtype, device = x.dtype, x.device
    needs_grad = x.requires_grad
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype != dtype or tensor.device != device:
            return f"a weight is {tensor.dtype} on {tensor.device}, and x is {dtype} on {device}"
        if type(tensor) not in PLAIN and is_traceable_wrapper_subclass(tensor):
            return f"a weight is a {type(tensor).__name__}"
        needs_grad = needs_grad or tensor.requires_grad
    return GRADIENTS if needs_grad and torch.is_grad_enabled() else None


def watched(x: Tensor) -> str | None:
    """Who wants to see PyTorch's ops. For nobody, kernels may run without its dispatcher, which takes 0.3 ms."""
    if torch.compiler.is_compiling():
        return "a graph is traced"
    if type(x) not in PLAIN:
        return f"x is a {type(x).__name__}"
    if torch._C._len_torch_dispatch_stack():
        return "a dispatch mode is on, which is to see the ops"
    if torch._C._len_torch_function_stack():
        return "a function mode is on (torch.set_default_device and torch.device are), which is to see the calls"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _warn_once(token: int, module: str, reason: str) -> None:
    """Runs once while a graph is traced, where a warning could not be said otherwise."""
    if (token, reason) not in _told:
        _told.add((token, reason))
        warnings.warn(f"{module} runs on the reference path: {reason}", RuntimeWarning, stacklevel=4)


def input_refusal(x: Any, least: int, most: float = math.inf) -> str | None:
    """Why x is nothing to compute with: no tensor (a symbolic trace has others), or one of another rank."""
    if not isinstance(x, Tensor):
        return f"x is a {type(x).__name__}"
    return None if least <= x.dim() <= most else f"x has {x.dim()} dimensions"


def given(attn_mask: Any, is_causal: Any) -> dict[str, Any]:
    """What a call asks for besides x: a forward that somebody put in an eager one's place may take nothing else.

    By identity, since a symbolic trace has no truth values.
    """
    asked: dict[str, Any] = {} if attn_mask is None else {"attn_mask": attn_mask}
    return asked if is_causal is False else {**asked, "is_causal": is_causal}


def with_kernels(kind: type[nn.Module], mixin: type[KernelModule], name: str) -> type[Any]:
    """The class of ``kind``'s modules once they run on kernels: same state, same calls, one more base."""
    return type(name, (mixin, kind), {"__module__": kind.__module__, "runs_without": kind, "__doc__": mixin.__doc__})
