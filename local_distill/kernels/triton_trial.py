"""Whether Triton works on a device: the smallest kernel there is, then all others."""

from __future__ import annotations

import torch

from local_distill.kernels._triton_language import jit, tl
from local_distill.kernels.triton_self_check import check_kernels
from local_distill.kernels.triton_switch import launching_on

__all__ = ["try_triton"]


@jit
def _one_kernel(place: tl.tensor) -> None:
    tl.store(place, 1.0)


def try_triton(device: torch.device) -> None:
    """Compile and launch kernels and look at their results; raises whatever goes wrong."""
    place = torch.zeros(1, device=device)
    with launching_on(place):
        # Said, as Triton warns where it is not.
        _one_kernel[1,](place, enable_fp_fusion=True)
    check_kernels(device)
