"""Proof on pixels that a pipeline's geometry is right, for the user's own test suite."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import torch
from torchvision.transforms.v2 import functional as F

from local_distill._check import check_positive
from local_distill.errors import ConfigError, GeometryError, LocalDistillError, ShapeError
from local_distill.geometry import check_geometry
from local_distill.structures import CropGeometry
from local_distill.transforms.images import image_size
from local_distill.transforms.verification.cases import (
    KINDS,
    Case,
    check_seeds,
    check_sizes,
    with_geometry,
)
from local_distill.transforms.verification.displacement import Explanation, explain
from local_distill.transforms.verification.picture import draw_disagreement, reference_card
from local_distill.transforms.verification.repeated_calls import (
    Output,
    RepeatedCalls,
    generators_kept,
)
from local_distill.transforms.verification.structured_light import (
    Measurement,
    Signals,
    measure,
    read_signals,
)

__all__ = ["TrackingError", "TrackingReport", "assert_tracks"]

# Source px, and source px per (source px per view px). Well above what correct recipes show
# (benchmarks/false_alarms.py), and less than the error of (scale − 1) / 2 that counting from pixel
# centres makes in views reduced more than 3.2-fold.
_TOLERANCE, _TOLERANCE_PER_SCALE = 0.75, 0.1
_LEAST_AGREEING = 0.75  # of a view's judged pixels
_LEAST_JUDGED = 0.05  # of all seeds' pixels that should show the source
_LEAST_SEEN = 0.25  # of one view's: less may be what a far too strong blur leaves at the border
_FEWEST = 64  # pixels from which a view can be judged


class TrackingError(GeometryError, AssertionError):
    """A pipeline whose geometry does not say where its pixels lie, or can't be shown to.

    It is an ``AssertionError`` as well, so that test runners report a failure, not an error.
    """


class TrackingReport(NamedTuple):
    """What `assert_tracks` looked at, and how close it came."""

    seeds: int
    """Seeds that were sent."""
    kinds: tuple[str, ...]
    """Kinds of image that the pipeline took."""
    views: int
    """Views that were judged, over all seeds."""
    judged: float
    """Share of the pixels inside the source that could be judged."""
    largest_median: float
    """Largest median error of a view, source px."""
    largest: float
    """Largest error of the fitted position of any pixel, source px."""


class _Totals:
    """Sums over the seeds, per view."""

    def __init__(self) -> None:
        self.inside: list[int] = []
        self.judged: list[int] = []
        self.views = 0
        self.largest_median = 0.0
        self.largest = 0.0

    def add(self, index: int, found: Measurement) -> None:
        for counts in (self.inside, self.judged):
            counts.extend([0] * (index + 1 - len(counts)))
        self.inside[index] += found.inside
        if not _can_be_judged(found):
            return
        self.judged[index] += found.judged
        self.views += 1
        self.largest_median = max(self.largest_median, found.median)
        self.largest = max(self.largest, found.largest)


def assert_tracks(
    pipeline: Callable[..., Any],
    *,
    seeds: int | Iterable[int] = 20,
    sizes: Sequence[tuple[int, int]] = ((224, 301), (257, 190)),
    kinds: Sequence[str] | None = None,
    tolerance: float | None = None,
    trust: Iterable[type | Callable[..., Any]] = (),
    picture: str | Path | None = None,
) -> TrackingReport:
    """Assert that a pipeline's geometry says where its pixels lie, whatever it does to the colours.

    For each seed, 16 grey sinusoids of two periods go through the pipeline in four phases each. The
    pixels' phase tells their position in the source, and no brightness, contrast, hue, blur, noise
    or other change of colours moves it. It is compared with ``geometry.matrix``, view by view: by
    the affine map that fits a view's pixels best, and by how many of its pixels agree at all.

    Convention: errors are in source pixels. Pixels that lie outside the source, or too near its
    border for the filter, and those that were erased or filled, are left out. What leaves less than
    a quarter of the pixels in another place, such as a small pasted patch, is not seen; nor is what
    happens with a probability so small that no seed shows it.

    Args:
        pipeline: image → (view, `CropGeometry`), or → (list of views, list of `CropGeometry`), or
            a torchvision v2 pipeline, which is then tracked with `track`. It must draw its random
            numbers from torch's, numpy's or Python's global generator, or be copied by
            ``copy.deepcopy`` together with its own.
        seeds: how many seeds, or which ones. Sizes and kinds take turns over them.
        sizes: (height, width) of the images that are sent, in pixels.
        kinds: of image, among "pil" (8-bit RGB), "tensor" (uint8) and "float" (float32 in [0, 1]).
            None: "pil" and "tensor", less one of them that the pipeline never takes.
        tolerance: for a view's median error, in source px; twice as much for its worst pixel. None:
            0.75 + 0.1 · (source px per view px).
        trust: passed on to `track`.
        picture: where to draw the first disagreement, a PNG; None: into the folder for temporary
            files. The message names it.

    Returns:
        `TrackingReport`, with the share of pixels judged and the largest errors.

    Raises:
        TrackingError: the pixels lie elsewhere; sizes are wrong; one seed does not always give the
            same; or hardly any pixel could be judged. It is an AssertionError and a ValueError.
        ConfigError: a setting that cannot be, or a pipeline that returns no geometry or fails.

    Example:
        >>> from torchvision.transforms import v2
        >>> recipe = v2.Compose([v2.RandomResizedCrop(64), v2.RandomHorizontalFlip()])
        >>> report = assert_tracks(recipe, seeds=4)
        >>> report.views, report.kinds, report.largest < 0.5
        (4, ('pil', 'tensor'), True)

        A pipeline that flips the view and not its geometry fails with::

            the geometry does not say where the view's pixels lie: mirrored left to right
              off by:  median 75.25 px, largest 145.79 px in the source; the median may be ...
              seen in: seed 0, a PIL image of (height, width) = (224, 301), view of (64, 64)
              repeat:  assert_tracks(pipeline, seeds=[0], sizes=[(224, 301)], kinds=['pil'])
              picture: /tmp/assert_tracks_seed0_view0_2k1x.png

    Source: the phases are read as in phase-shifting interferometry (Bruning et al. 1974, "Digital
        wavefront measuring interferometer"), over whole periods as with two wavelengths (Cheng and
        Wyant 1984, "Two-wavelength phase shifting interferometry").
    """
    numbers = check_seeds(seeds)
    shapes = check_sizes(sizes)
    if tolerance is not None:
        check_positive("tolerance", tolerance)
    with generators_kept():
        calls = RepeatedCalls(with_geometry(pipeline, trust, shapes[0]))
        taken = _kinds_taken(calls, kinds, numbers, shapes)
        pairs = [(size, kind) for kind in taken for size in shapes]
        totals = _Totals()
        for turn, seed in enumerate(numbers):
            case = Case(seed, *pairs[turn % len(pairs)])
            _check_case(calls, case, totals, tolerance, picture)
    return _report(totals, len(numbers), taken)


def _check_case(
    calls: RepeatedCalls,
    case: Case,
    totals: _Totals,
    tolerance: float | None,
    picture: str | Path | None,
) -> None:
    """Send the patterns for one seed, and judge each view."""
    outputs = _send(calls, case)
    found = _measure(outputs, case) if _one_geometry(outputs) else []
    if not found or not all(_agrees(each, tolerance) for each in found):
        # Under one seed all calls have to be alike before they can be held against the geometry.
        if not _one_geometry(outputs) or not _repeats(calls, case, outputs):
            if not calls.copy_from_now_on():
                raise _not_repeatable(case)
            outputs = _send(calls, case)
            if not _one_geometry(outputs) or not _repeats(calls, case, outputs):
                raise _not_repeatable(case)
        found = _measure(outputs, case)
    for index, each in enumerate(found):
        if not _agrees(each, tolerance):
            raise _disagreement(calls, case, outputs, index, each, tolerance, picture)
        totals.add(index, each)


def _send(calls: RepeatedCalls, case: Case) -> list[Output]:
    try:
        outputs = calls(case.pattern_images(), case.seed)
    except Exception as error:
        raise _failure(case, error) from error
    for views, geometries in outputs:
        for index, (view, geometry) in enumerate(zip(views, geometries, strict=True)):
            _check_sizes_agree(
                case, f"geometry {index}" if len(views) > 1 else "the geometry", view, geometry
            )
    return outputs


def _measure(outputs: Sequence[Output], case: Case) -> list[Measurement]:
    return [
        measure(_signals(outputs, index, case), geometry)
        for index, geometry in enumerate(outputs[0][1])
    ]


def _signals(
    outputs: Sequence[Output], index: int, case: Case, *, every_pixel: bool = False
) -> Signals:
    views = [views[index] for views, _ in outputs]
    return read_signals(views, case.size, every_pixel=every_pixel)


def _can_be_judged(found: Measurement) -> bool:
    return found.judged >= max(_FEWEST, _LEAST_SEEN * found.inside)


def _agrees(found: Measurement, tolerance: float | None) -> bool:
    if not _can_be_judged(found):
        return True  # nothing is said about it; `_report` sees to it that this is no habit
    limit = _limit(found, tolerance)
    return (
        found.agreeing >= _LEAST_AGREEING
        and found.median <= limit
        and found.largest <= 2 * limit
        and found.scattered <= limit
    )


def _limit(found: Measurement, tolerance: float | None) -> float:
    return _TOLERANCE + _TOLERANCE_PER_SCALE * found.scale if tolerance is None else tolerance


def _one_geometry(outputs: Sequence[Output]) -> bool:
    first = outputs[0][1]
    return all(
        len(geometries) == len(first)
        and all(
            torch.equal(a, b)
            for one, other in zip(first, geometries, strict=True)
            for a, b in zip(one, other, strict=True)
        )
        for _, geometries in outputs[1:]
    )


def _repeats(calls: RepeatedCalls, case: Case, outputs: Sequence[Output]) -> bool:
    """Whether the first image gives the same views once more."""
    once_more = calls.again(case.pattern_images()[0], case.seed)
    if not _one_geometry([outputs[0], once_more]):
        return False
    for before, after in zip(outputs[0][0], once_more[0], strict=True):
        one, other = (
            F.pil_to_tensor(v) if isinstance(v, PIL.Image.Image) else v for v in (before, after)
        )
        if one.shape != other.shape or not torch.allclose(one, other, equal_nan=True):
            return False
    return True


def _not_repeatable(case: Case) -> TrackingError:
    return TrackingError(
        f"`pipeline` does not give the same twice under one seed ({case}): it draws random numbers "
        "from elsewhere than torch's, numpy's and Python's global generators, or counts its calls, "
        "and copy.deepcopy does not copy that; let it draw from torch's global generator"
    )


def _check_sizes_agree(case: Case, name: str, view: Any, geometry: CropGeometry) -> None:
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


def _disagreement(
    calls: RepeatedCalls,
    case: Case,
    outputs: Sequence[Output],
    index: int,
    found: Measurement,
    tolerance: float | None,
    picture: str | Path | None,
) -> TrackingError:
    geometries = outputs[0][1]
    geometry = geometries[index]
    others = {other: geometries[other] for other in range(len(geometries)) if other != index}
    explanation = explain(_signals(outputs, index, case, every_pixel=True), geometry, others)
    which = f"geometry {index} of {len(geometries)}" if others else "the geometry"
    limit = _limit(found, tolerance)
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


def _report(totals: _Totals, seeds: int, kinds: Sequence[str]) -> TrackingReport:
    for index, (inside, judged) in enumerate(zip(totals.inside, totals.judged, strict=True)):
        if judged >= max(_FEWEST, _LEAST_JUDGED * inside):
            continue
        name = f"view {index}" if len(totals.inside) > 1 else "the view"
        reason = (
            f"its geometry puts only {inside} of the pixels looked at inside the source, clear of "
            "its border"
            if inside < _FEWEST
            else f"only {judged} of {inside} pixels showed the patterns that were sent"
        )
        raise TrackingError(
            f"nothing can be said about {name}: {reason}, over {seeds} seeds. Is it larger than "
            "10 px, and does it show the image? Try larger `sizes`, or a pipeline with less blur "
            "and fill"
        )
    share = sum(totals.judged) / sum(totals.inside)
    return TrackingReport(
        seeds, tuple(kinds), totals.views, share, totals.largest_median, totals.largest
    )


def _kinds_taken(
    calls: RepeatedCalls,
    kinds: Sequence[str] | None,
    seeds: Sequence[int],
    sizes: Sequence[tuple[int, int]],
) -> tuple[str, ...]:
    """The kinds to send: those asked for, or those of the usual ones that ever go through."""
    if kinds is not None:
        if isinstance(kinds, str) or not kinds or any(kind not in KINDS for kind in kinds):
            raise ConfigError(
                f"`kinds` must be a list of {', '.join(map(repr, KINDS))}, got {kinds!r}"
            )
        return tuple(kinds)
    taken, failures = [], []
    for kind in ("pil", "tensor"):
        for turn, seed in enumerate(seeds):
            case = Case(seed, sizes[turn % len(sizes)], kind)
            try:
                calls(case.pattern_images()[:1], seed)
            except Exception as error:  # any exception may be how a pipeline refuses a kind
                failures.append((case, error))
            else:
                taken.append(kind)
                break
    if not taken:
        raise _failure(*failures[0]) from failures[0][1]
    return tuple(taken)


def _failure(case: Case, error: Exception) -> LocalDistillError:
    """An error of the pipeline's, with what it was given; a wrong geometry stays one."""
    kind = TrackingError if isinstance(error, GeometryError) else ConfigError
    if isinstance(error, ConfigError):
        return ConfigError(str(error))
    return kind(
        f"`pipeline` raised {type(error).__name__} on {case}: {error}; name the kinds of image "
        f"that it takes with `kinds`, among {', '.join(map(repr, KINDS))}"
    )
