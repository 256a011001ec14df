"""Proof on pixels that a pipeline's geometry is right, for the user's own test suite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torchvision.transforms.v2 import functional as F

from local_distill._check import check_positive
from local_distill.errors import ConfigError
from local_distill.transforms.generators import generators_kept
from local_distill.transforms.verification.cases import (
    KINDS,
    Case,
    check_seeds,
    check_sizes,
    with_geometry,
)
from local_distill.transforms.verification.failures import (
    check_sizes_agree,
    disagreement,
    failure,
    not_repeatable,
    signals_of,
)
from local_distill.transforms.verification.judgement import (
    Totals,
    TrackingReport,
    agrees,
    report,
)
from local_distill.transforms.verification.repeated_calls import Output, RepeatedCalls
from local_distill.transforms.verification.structured_light import Measurement, measure

__all__ = ["assert_tracks"]


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
        totals = Totals()
        for turn, seed in enumerate(numbers):
            case = Case(seed, *pairs[turn % len(pairs)])
            _check_case(calls, case, totals, tolerance, picture)
    return report(totals, len(numbers), taken)


def _check_case(
    calls: RepeatedCalls,
    case: Case,
    totals: Totals,
    tolerance: float | None,
    picture: str | Path | None,
) -> None:
    """Send the patterns for one seed, and judge each view."""
    outputs = _send(calls, case)
    found = _measure(outputs, case) if _one_geometry(outputs) else []
    if not found or not all(agrees(each, tolerance) for each in found):
        # Under one seed all calls have to be alike before they can be held against the geometry.
        if not _one_geometry(outputs) or not _repeats(calls, case, outputs):
            if not calls.copy_from_now_on():
                raise not_repeatable(case)
            outputs = _send(calls, case)
            if not _one_geometry(outputs) or not _repeats(calls, case, outputs):
                raise not_repeatable(case)
        found = _measure(outputs, case)
    for index, each in enumerate(found):
        if not agrees(each, tolerance):
            raise disagreement(calls, case, outputs, index, each, tolerance, picture)
        totals.add(index, each)


def _send(calls: RepeatedCalls, case: Case) -> list[Output]:
    try:
        outputs = calls(case.pattern_images(), case.seed)
    except Exception as error:
        raise failure(case, error) from error
    for views, geometries in outputs:
        for index, (view, geometry) in enumerate(zip(views, geometries, strict=True)):
            check_sizes_agree(
                case, f"geometry {index}" if len(views) > 1 else "the geometry", view, geometry
            )
    return outputs


def _measure(outputs: Sequence[Output], case: Case) -> list[Measurement]:
    return [
        measure(signals_of(outputs, index, case), geometry)
        for index, geometry in enumerate(outputs[0][1])
    ]


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
        raise failure(*failures[0]) from failures[0][1]
    return tuple(taken)
