"""What a matcher of one's own asks of its two views first, as those of the package do."""

from __future__ import annotations

from local_distill._check import Axes, check_floating
from local_distill._geometric_inputs import check_tokens, geometric_inputs
from local_distill.errors import ConfigError, ShapeError
from local_distill.geometry import check_geometry
from local_distill.structures import Tokens

__all__ = ["check_pair"]


def check_pair(
    student: Tokens, teacher: Tokens, *, features: bool = False, geometry: bool = False
) -> None:
    """Refuse two views that cannot be matched, with an error that names the argument and the fix.

    Shapes and dtypes are always looked at; values, such as the sizes of the sources, only where
    that costs nothing: on the CPU, outside of ``torch.compile`` and ``torch.vmap``. So it breaks no
    graph and waits for no device. A batch of 1 is not one that fits all others.

    Args:
        student: `Tokens` of the student's view.
        teacher: `Tokens` of the teacher's view of the same images.
        features: whether the matcher looks at features: both views need them, (b, s, d) and
            (b, t, d), of as many tokens as the grid has. They may hold NaN: such tokens are to be
            left unmatched, not refused.
        geometry: whether it looks at places: both views need geometry and grid, of the same batch
            and of sources of the same sizes. Where features alone are asked for, a geometry that is
            there has to be sound all the same.

    Raises:
        ShapeError: features, geometry or grid are missing; b, d or a number of tokens differs.
        GeometryError: a singular, non-finite or half-precision geometry, or different sources.
        ConfigError: neither ``features`` nor ``geometry`` is asked for.

    Example:
        >>> import torch
        >>> one, two = Tokens(torch.ones(1, 6, 8)), Tokens(torch.ones(32, 4, 8))
        >>> check_pair(one, two, features=True)
        Traceback (most recent call last):
        ...
        local_distill.errors.ShapeError: axis `b` is 1 in `student.features` but 32 in \
`teacher.features` (shape (32, 4, 8), wanted `b t d`)
        >>> check_pair(two, two, features=True)
    """
    if not (features or geometry):
        raise ConfigError(
            "`features` and `geometry` are both False, which leaves nothing to check; say what the "
            "matcher looks at: check_pair(student, teacher, features=True)"
        )
    if geometry:
        geometric_inputs(student, teacher, user="this matcher")
    if not features:
        return
    axes = Axes()
    for name, tokens, count in (("student", student, "s"), ("teacher", teacher, "t")):
        check_tokens(name, tokens)
        if tokens.features is None:
            raise ShapeError(
                f"`{name}` has no features, which this matcher needs: "
                "Tokens(features, geometry, grid)"
            )
        found = axes.bind(f"{name}.features", tokens.features, f"b {count} d")
        check_floating(f"{name}.features", found)
        if tokens.geometry is not None and not geometry:
            check_geometry(f"{name}.geometry", tokens.geometry, tokens.grid)
