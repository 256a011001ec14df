"""The messages that `assert_tracks` fails with: what is wrong, where, and how to repeat it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchvision.transforms.v2 import functional as F

from local_distill.errors import ConfigError, GeometryError, LocalDistillError, ShapeError
from local_distill.geometry import check_geometry
from local_distill.structures import CropGeometry
from local_distill.transforms.images import image_size
from local_distill.transforms.verification.cases import KINDS, Case
from local_distill.transforms.verification.displacement import Explanation, explain
from local_distill.transforms.verification.judgement import TrackingError, limit_of
from local_distill.transforms.verification.picture import draw_disagreement, reference_card
from local_distill.transforms.verification.repeated_calls import Output, RepeatedCalls
from local_distill.transforms.verification.structured_light import (
    Measurement,
    Signals,
    read_signals,
)

__all__ = ["check_sizes_agree", "disagreement", "failure", "not_repeatable", "signals_of"]


def not_repeatable(case: Case) -> TrackingError:
    """The error for a pipeline that gives other views under the same seed."""
    return TrackingError(
        f"`pipeline` does not give the same twice under one seed ({case}): it draws random numbers "
        "from elsewhere than torch's, numpy's and Python's global generators, or counts its calls, "
        "and copy.deepcopy does not copy that; let it draw from torch's global generator"
    )


def check_sizes_agree(case: Case, name: str, view: Any, geometry: CropGeometry) -> None:
    """Refuse a geometry that cannot be, or is of another size than the view or the image.

    Raises:
        TrackingError: naming both sizes.
    """
    try:
        check_geometry(name, geometry)
    except (GeometryError, ShapeError) as error:
        raise TrackingError(f"{error} ({case})") from error
    if geometry.matrix.dim() != 2:
        raise TrackingError(
            f"{name} must be of one view, with a (3, 3) matrix, got "
            f"{tuple(geometry.matrix.shape)}; return a list with one per view ({case})"
        )
    for what, told, real in (
        ("view_size", geometry.view_size, image_size(view)),
        ("source_size", geometry.source_size, case.size),
    ):
        height, width = told.tolist()
        if (height, width) == tuple(real):
            continue
        swapped = (width, height) == tuple(real)
        hint = ": it was given as (width, height)" if swapped else ""
        raise TrackingError(
            f"{name} has {what} ({height}, {width}), but the {what.split('_')[0]} is (height, "
            f"width) = {tuple(real)}{hint} ({case})"
        )


def failure(case: Case, error: Exception) -> LocalDistillError:
    """An error of the pipeline's, with what it was given; a wrong geometry stays one."""
    kind = TrackingError if isinstance(error, GeometryError) else ConfigError
    if isinstance(error, ConfigError):
        return ConfigError(str(error))
    return kind(
        f"`pipeline` raised {type(error).__name__} on {case}: {error}; name the kinds of image "
        f"that it takes with `kinds`, among {', '.join(map(repr, KINDS))}"
    )


def signals_of(
    outputs: Sequence[Output], index: int, case: Case, *, every_pixel: bool = False
) -> Signals:
    """What the pixels of one view tell, from the outputs for all patterns."""
    views = [views[index] for views, _ in outputs]
    return read_signals(views, case.size, every_pixel=every_pixel)


def disagreement(
    calls: RepeatedCalls,
    case: Case,
    outputs: Sequence[Output],
    index: int,
    found: Measurement,
    tolerance: float | None,
    picture: str | Path | None,
) -> TrackingError:
    """The error for a view whose pixels lie elsewhere, with its picture drawn."""
    geometries = outputs[0][1]
    geometry = geometries[index]
    others = {other: geometries[other] for other in range(len(geometries)) if other != index}
    explanation = explain(signals_of(outputs, index, case, every_pixel=True), geometry, others)
    which = f"geometry {index} of {len(geometries)}" if others else "the geometry"
    limit = limit_of(found, tolerance)
    if explanation.shown is None:
        off = f"only {found.agreeing:.0%} of the pixels that could be judged lie near their place"
    else:
        off = (
            f"median {explanation.median:.2f} px, largest {explanation.largest:.2f} px in the "
            f"source; the median may be {limit:.2f} px, the largest {2 * limit:.2f} px"
        )
    settings = f"seeds=[{case.seed}], sizes=[{case.size}], kinds=[{case.kind!r}]"
    if tolerance is not None:
        settings += f", tolerance={tolerance}"
    if calls.copies:
        settings += "), with all seeds before it, as the pipeline has a generator of its own"
    else:
        settings += ")"
    path = _draw(calls, case, index, explanation, picture)
    return TrackingError(
        f"{which} does not say where the view's pixels lie: {explanation.words}\n"
        f"  off by:  {off}\n"
        f"  seen in: {case}, view of {tuple(geometry.view_size.tolist())}\n"
        f"  repeat:  assert_tracks(pipeline, {settings}\n"
        f"  picture: {path}"
    )


def _draw(
    calls: RepeatedCalls,
    case: Case,
    index: int,
    explanation: Explanation,
    picture: str | Path | None,
) -> str:
    """Draw the disagreement; where the file is, or why there is none."""
    card = reference_card(*case.size)
    try:
        views, geometries = calls.again(case.image(F.pil_to_tensor(card)), case.seed)
        drawn = draw_disagreement(
            card, views[index], geometries[index], explanation.shown, explanation.words, str(case)
        )
        if picture is None:
            name = f"assert_tracks_seed{case.seed}_view{index}_"
            handle, path = tempfile.mkstemp(".png", name)
            with open(handle, "wb") as file:
                drawn.save(file, "PNG")
            return path
        drawn.save(picture, "PNG")
    except Exception as error:  # the disagreement must be told, picture or not
        return f"none, drawing it failed with {type(error).__name__}: {error}"
    return str(picture)
