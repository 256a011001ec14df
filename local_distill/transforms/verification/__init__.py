"""`assert_tracks`: proof on pixels that a pipeline's geometry is right."""

from __future__ import annotations

from local_distill.transforms.verification.assertion import assert_tracks
from local_distill.transforms.verification.judgement import TrackingError, TrackingReport

__all__ = ["TrackingError", "TrackingReport", "assert_tracks"]
