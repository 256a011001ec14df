"""`upgrade`: torchvision v1 pipelines with the same pixels, and geometry beside them."""

from __future__ import annotations

from local_distill.transforms.upgrading.upgrade import Upgraded, UpgradedViews, upgrade

__all__ = ["Upgraded", "UpgradedViews", "upgrade"]
