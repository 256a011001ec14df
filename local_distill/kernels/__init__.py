"""Fast forms of what the other rooms compute plainly, and numerics that several rooms share."""

from __future__ import annotations

from local_distill.kernels.byte_budget import block_length, byte_budget
from local_distill.kernels.log_sinkhorn import log_sinkhorn, log_uniform
from local_distill.kernels.prototype_bytes import use_prototype_bytes
from local_distill.kernels.triton_switch import use_triton

__all__ = [
    "block_length",
    "byte_budget",
    "log_sinkhorn",
    "log_uniform",
    "use_prototype_bytes",
    "use_triton",
]
