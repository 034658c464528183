"""Launches that overlap: programmatic dependent launch, on sm_90 and newer, where ``Target.overlaps``."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def await_launches(PDL: tl.constexpr):
    """From here on all that was launched before has ended. Only now may the next begin: it waits for this one alone."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
