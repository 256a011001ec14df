"""Pictures: views on their source, token grids, footprints, and lines between matched tokens.

Every function draws onto matplotlib axes of the caller's; none touches pyplot or its global state,
so all work without a display and in threads. matplotlib comes with the extra ``train``.
"""

from __future__ import annotations

from local_distill.viz.figures import denormalize, new_figure, view_colors
from local_distill.viz.footprints import draw_footprints, token_colors
from local_distill.viz.match_figure import match_figure
from local_distill.viz.matches import draw_matches
from local_distill.viz.principal_colors import principal_colors, principal_figure
from local_distill.viz.views import draw_tokens, draw_views

__all__ = [
    "denormalize",
    "draw_footprints",
    "draw_matches",
    "draw_tokens",
    "draw_views",
    "match_figure",
    "new_figure",
    "principal_colors",
    "principal_figure",
    "token_colors",
    "view_colors",
]
