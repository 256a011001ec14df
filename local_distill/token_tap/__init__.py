"""Patch tokens out of a backbone that somebody else's code calls."""

from local_distill.token_tap.tap import TappedView, TokenTap

__all__ = ["TappedView", "TokenTap"]
