"""Fast forms of what the other rooms compute plainly, and numerics that several rooms share."""

from __future__ import annotations

from local_distill.kernels.byte_budget import block_length, byte_budget

__all__ = ["block_length", "byte_budget"]
