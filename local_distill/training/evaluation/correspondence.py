"""How far features' nearest neighbour lies from the true place, across two views of an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from local_distill._check import check_at_least
from local_distill.backbones import TimmBackbone
from local_distill.errors import ConfigError, DataError
from local_distill.matching import SimilarityMatcher
from local_distill.matching.diagnostics import correspondence_error, reachable_tokens
from local_distill.structures import CropGeometry, Matcher, Matches, Tokens
from local_distill.transforms.multi_crop import MultiCrop

__all__ = [
    "CorrespondenceErrors",
    "ViewPairs",
    "correspondence_errors",
    "correspondence_views",
    "draw_view_pairs",
    "summarise_errors",
]

_RADII = (0.5, 1.0, 2.0)
# A true partner is one that `NearestMatcher` finds by default.
_THRESHOLD = 0.5


class ViewPairs(NamedTuple):
    """Two views of each of some images, drawn already: what repeated evaluations share.

    Attributes:
        student: (n, 3, h, w) first views, as a network takes them.
        teacher: (n, 3, h, w) second views.
        student_geometry: where the first ones lie in the images.
        teacher_geometry: where the second ones lie.
    """

    student: Tensor
    teacher: Tensor
    student_geometry: CropGeometry
    teacher_geometry: CropGeometry


class CorrespondenceErrors(NamedTuple):
    """Distances from the true place in larger cell diagonals, one a token that has a true partner.

    Attributes:
        features: (n,) of the most similar teacher token; +inf where the matcher gave none.
        chance: (n,) of a teacher token drawn at random.
        same_place: (n,) of the token at the same place *in the view*: what features that tell
            nothing but their position would reach. None where the two grids differ.

    Example:
        >>> errors = CorrespondenceErrors(torch.zeros(3), torch.ones(3), None)
        >>> summarise_errors(errors.features)["mean"]
        0.0
    """

    features: Tensor
    chance: Tensor
    same_place: Tensor | None


def correspondence_views(size: int | tuple[int, int]) -> MultiCrop:
    """The two views that correspondence is tested on by default: mild colours, much overlap.

    Each shows 35 to 100 % of the image, at least a fifth of the smaller one is in the other, and
    each is mirrored every other time.

    Args:
        size: side, or (height, width), in pixels.

    Example:
        >>> views, _ = correspondence_views(48)(torch.rand(3, 64, 64))
        >>> [tuple(view.shape) for view in views]
        [(3, 48, 48), (3, 48, 48)]
    """
    return MultiCrop(
        global_size=size,
        local_count=0,
        global_scale=(0.35, 1.0),
        color_jitter=(0.4, 0.4, 0.2, 0.03),
        grayscale_p=0.1,
        blur_p=(0.0, 0.0, 0.0),
        solarize_p=0.0,
        min_global_overlap=0.2,
    )


def draw_view_pairs(
    images: Dataset[tuple[Any, int]],
    views: MultiCrop,
    *,
    count: int | None = None,
    seed: int = 0,
    description: str | None = None,
) -> ViewPairs:
    """Draw the first two global views of images.

    Args:
        images: gives (PIL image or tensor, label); held-out ones.
        views: such as `correspondence_views` or `DemoCrop`; its global views have to be of one
            size.
        count: at most so many images, from the first on; None: all.
        seed: of the views. The global generator is left as it was.
        description: beside a progress bar; None: no bar.

    Returns:
        `ViewPairs`.

    Raises:
        ConfigError: no image, fewer than two global views, or global views of several sizes.

    Example:
        >>> from local_distill.training import SyntheticScenes
        >>> pairs = draw_view_pairs(SyntheticScenes(4), correspondence_views(32))
        >>> tuple(pairs.student.shape), tuple(pairs.student_geometry.matrix.shape)
        ((4, 3, 32, 32), (4, 3, 3))
    """
    total = len(images)  # type: ignore[arg-type]
    if count is not None:
        total = min(total, check_at_least("count", count, 1))
    if total == 0:
        raise ConfigError("`images` is empty: there is nothing to draw views of")
    if views.num_global < 2 or len(set(views.view_sizes[:2])) > 1:
        raise ConfigError(
            f"`views` must have two global views of one size, got {views.num_global} and the sizes "
            f"{views.view_sizes[: views.num_global]}"
        )
    drawn: list[tuple[Tensor, Tensor, CropGeometry, CropGeometry]] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for i in tqdm(
            range(total),
            desc=description,
            leave=False,
            dynamic_ncols=True,
            disable=description is None,
        ):
            pictures, geometries = views(images[i][0])
            drawn.append((pictures[0], pictures[1], geometries[0], geometries[1]))
    student, teacher, student_geometry, teacher_geometry = zip(*drawn, strict=True)
    return ViewPairs(
        torch.stack(student),
        torch.stack(teacher),
        _stacked(student_geometry),
        _stacked(teacher_geometry),
    )


@torch.inference_mode()
def correspondence_errors(
    backbone: TimmBackbone,
    pairs: ViewPairs,
    *,
    matcher: Matcher | None = None,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    seed: int = 0,
    description: str | None = None,
) -> CorrespondenceErrors:
    """How far the most similar teacher token lies from each student token's true place.

    Convention: only student tokens with a true partner count, a teacher token within half a larger
    cell diagonal of their centre (`reachable_tokens`), so perfect features stay below 0.5; those
    whose place the other view does not show take no part. See `correspondence_error` for the unit.

    Args:
        backbone: is put into evaluation mode and back; has to be on ``device``.
        pairs: views of held-out images.
        matcher: what pairs the tokens; None: `SimilarityMatcher`.
        batch_size: pairs at a time.
        device: where to compute.
        seed: of the chance level.
        description: beside a progress bar; None: no bar.

    Returns:
        `CorrespondenceErrors`, on the CPU.

    Raises:
        DataError: no token has a true partner: the views do not overlap.

    Example:
        >>> from local_distill.backbones import tiny_vit
        >>> from local_distill.training import SyntheticScenes
        >>> pairs = draw_view_pairs(SyntheticScenes(4), correspondence_views(32))
        >>> errors = correspondence_errors(tiny_vit(width=24), pairs)
        >>> errors.features.shape == errors.chance.shape == errors.same_place.shape
        True
    """
    check_at_least("batch_size", batch_size, 1)
    match = SimilarityMatcher() if matcher is None else matcher
    generator = torch.Generator().manual_seed(seed)
    was_training = backbone.training
    backbone.eval()
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    bar = tqdm(
        range(0, len(pairs.student), batch_size),
        desc=description,
        leave=False,
        dynamic_ncols=True,
        disable=description is None,
    )
    same_grid = False
    try:
        for start in bar:
            part = slice(start, start + batch_size)
            student = _tokens(backbone, pairs.student[part], pairs.student_geometry, part, device)
            teacher = _tokens(backbone, pairs.teacher[part], pairs.teacher_geometry, part, device)
            b, s, t = len(student.features), student.num_tokens, teacher.num_tokens  # type: ignore[arg-type]
            same_grid = student.grid == teacher.grid
            anywhere = torch.randint(0, t, (b, s), generator=generator)
            there = torch.arange(s).expand(b, s) if same_grid else anywhere
            counted = reachable_tokens(student, teacher, _THRESHOLD)
            ways = (match(student, teacher), _hard(anywhere, device), _hard(there, device))
            errors = [correspondence_error(way, student, teacher)[counted].cpu() for way in ways]
            parts.append((errors[0], errors[1], errors[2]))
    finally:
        backbone.train(was_training)
    features, chance, same_place = (torch.cat(column) for column in zip(*parts, strict=True))
    if len(features) == 0:
        raise DataError("`pairs`: no token of one view is seen in the other: they do not overlap")
    return CorrespondenceErrors(features, chance, same_place if same_grid else None)


def summarise_errors(errors: Tensor, radii: Sequence[float] = _RADII) -> dict[str, float]:
    """Median and mean error, and the share of tokens within some radii, as key points have it.

    Args:
        errors: (n,) in larger cell diagonals; +inf counts as missed everywhere and has no part in
            the mean.
        radii: in larger cell diagonals.

    Returns:
        "median", "mean" and "within_R" for each radius R; the median is +inf where most are.

    Raises:
        DataError: no error.

    Example:
        >>> summarise_errors(torch.tensor([0.0, 0.25, 0.75, 3.0]), radii=[0.5, 1])
        {'median': 0.5, 'mean': 1.0, 'within_0.5': 0.5, 'within_1': 0.75}
    """
    if errors.numel() == 0:
        raise DataError("`errors` is empty: no token has a true partner")
    wide = errors.double()
    finite = wide[wide.isfinite()]
    summary = {
        "median": float(wide.sort().values[[(len(wide) - 1) // 2, len(wide) // 2]].mean()),
        "mean": float(finite.mean()) if len(finite) else float("inf"),
    }
    summary.update({f"within_{r:g}": float((wide < r).double().mean()) for r in radii})
    return summary


def _tokens(
    backbone: TimmBackbone,
    views: Tensor,
    geometry: CropGeometry,
    part: slice,
    device: torch.device | str,
) -> Tokens:
    view_size = (int(views.shape[-2]), int(views.shape[-1]))
    features = backbone(views.to(device)).patch_tokens
    if not bool(features.isfinite().all()):
        raise DataError("`backbone` gives features that are not finite: its weights have diverged")
    mine = CropGeometry(*(entry[part] for entry in geometry)).to(device)
    return Tokens(features, mine, backbone.token_grid(view_size))


def _hard(index: Tensor, device: torch.device | str) -> Matches:
    """One teacher token each, whatever its cost."""
    index = index.to(device)
    ones = torch.ones(index.shape, device=device)
    return Matches(index[..., None], ones[..., None], torch.zeros_like(ones))


def _stacked(geometries: Sequence[CropGeometry]) -> CropGeometry:
    return CropGeometry(*(torch.stack(column) for column in zip(*geometries, strict=True)))
