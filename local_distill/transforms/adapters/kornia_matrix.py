"""kornia augmentations: the matrices of their last call, with the half pixel undone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from local_distill.errors import ConfigError, GeometryError
from local_distill.structures import CropGeometry
from local_distill.transforms.adapters._steps import check_size, to_continuous, view_geometry

__all__ = ["from_kornia"]

Size = tuple[int, int]

_CONTAINERS = {"AugmentationSequential", "ImageSequential"}
# Each was compared with its pixels: but for half a pixel, kornia 0.9's matrix is right.
_KEEP_SIZE = {
    *("RandomAffine", "RandomHorizontalFlip", "RandomPerspective", "RandomRotation"),
    *("RandomRotation90", "RandomShear", "RandomTranslate", "RandomVerticalFlip"),
}
_CROPS = {"CenterCrop", "RandomCrop", "RandomResizedCrop"}
_RESIZES = {"LongestMaxSize", "Resize", "SmallestMaxSize"}
_TRACKED = _KEEP_SIZE | _CROPS | _RESIZES | {"PadTo"}

_LATER = "use crops, resizes, flips, rotations, affine or perspective maps, which are read"
_MIX = "it shows pixels of another place or image; apply it after the geometry is read"
_REFUSED = {
    "RandomElasticTransform": f"its displacement is no homography and its matrix is one; {_LATER}",
    "RandomFisheye": f"its distortion is no homography; {_LATER}",
    "RandomThinPlateSpline": f"its distortion is no homography and its matrix is one; {_LATER}",
    "PatchSequential": "it moves patches apart from each other; use AugmentationSequential",
    "VideoSequential": "it takes videos; use AugmentationSequential on the frames",
    **dict.fromkeys(
        (
            "RandomCutMixV2",
            "RandomJigsaw",
            "RandomMixUpV2",
            "RandomMosaic",
            "RandomTransplantation",
        ),
        _MIX,
    ),
    "PatchMix": _MIX,
}


def from_kornia(
    augmentation: nn.Module,
    source_size: Size,
    view_size: Size,
    *,
    batch: int | None = None,
    trust: Iterable[type | Callable[..., Any]] = (),
) -> CropGeometry:
    """Where the views of an augmentation's last call lie in its input.

    With M_i the matrix of step i (input → output, in kornia's coordinates) and S the shift by half
    a pixel: ``matrix = (S M_n … M_1 S⁻¹)⁻¹``.

    Convention: kornia counts from pixel *centres*, so its first pixel is at 0; ours is at 0.5. The
    matrix is worked out again from the drawn parameters in float64, whatever the image's dtype.

    Args:
        augmentation: an ``AugmentationSequential`` or ``ImageSequential``, or one 2D augmentation
            of kornia 0.9 or later, after a forward pass. It remembers its last call alone: read it
            before the next.
        source_size: (height, width) of the images that went in.
        view_size: (height, width) of the views that came out.
        batch: how many images went in. Needed only where a call may apply nothing at all, as with
            ``random_apply=(0, 2)``: such a call leaves no trace of its batch.
        trust: modules, or classes of modules, that move no pixels although this package does not
            know them.

    Returns:
        `CropGeometry` of the whole batch: float32 matrix (b, 3, 3), where kornia kept its
        parameters (the CPU, unless it was told otherwise).

    Raises:
        ConfigError: not run yet, a kornia before 0.9, or an augmentation that moves pixels in a way
            that its matrix does not say, with its name.
        GeometryError: the sizes are not those of the last call.

    Example:
        >>> import kornia.augmentation as K, torch
        >>> augmentation = K.AugmentationSequential(K.CenterCrop((10, 20)), K.Resize((5, 5)),
        ...     K.RandomHorizontalFlip(p=1.0))
        >>> views = augmentation(torch.zeros(2, 3, 30, 40))
        >>> from_kornia(augmentation, (30, 40), (5, 5)).matrix.shape
        torch.Size([2, 3, 3])

    Source:
        ``transform_matrix`` in ``kornia/augmentation/_2d/base.py`` of kornia 0.9.

    Deviations: a crop of one pixel across is placed at that pixel's middle; kornia's matrix puts
        the view's first pixel there and the rest beside it, though all show the same pixel.
    """
    trusted = list(trust)
    _check_version(augmentation)
    _check_modules(augmentation, trusted)
    size = source = check_size("source_size", source_size)
    view = check_size("view_size", view_size)
    matrix: Tensor | None = None
    if batch is not None:
        matrix = torch.eye(3, dtype=torch.float64).expand(batch, 3, 3)
    for module, params in _applied(augmentation):
        gate = params["batch_prob"]
        if matrix is None:
            matrix = torch.eye(3, dtype=torch.float64, device=gate.device).expand(len(gate), 3, 3)
        if len(gate) != len(matrix):
            raise GeometryError(
                f"{type(module).__name__} saw {len(gate)} images, and `batch` or a step before it "
                f"says {len(matrix)}; read the whole `augmentation` right after its call"
            )
        if type(module).__name__ in _TRACKED:
            _check_step(module, params, size)
            matrix = _step_matrix(module, params, size) @ matrix.to(gate.device)
            size = _size_after(module, params, size)
    if matrix is None:
        raise ConfigError(
            "the last call of `augmentation` applied nothing and left no trace of its batch; say "
            "how many images went in: `batch=…`"
        )
    if size != view:
        raise GeometryError(
            f"`view_size` is {view} but the last call made views of {size} (height, width)"
        )
    return view_geometry(to_continuous(matrix), view, source)


def _check_version(augmentation: object) -> None:
    kornia = sys.modules.get("kornia")
    version = getattr(kornia, "__version__", "0")
    if not _from_kornia_package(type(augmentation)):
        raise ConfigError(
            f"`augmentation` must be one of kornia's, got {type(augmentation).__name__}; put your "
            "modules into kornia.augmentation.AugmentationSequential"
        )
    major, minor = (int("".join(filter(str.isdigit, part)) or 0) for part in version.split(".")[:2])
    if (major, minor) < (0, 9):
        raise ConfigError(
            f"kornia {version} has matrices that disagree with its pixels (by 4 px and more for a "
            "padded RandomCrop, 0.8 px where align_corners=False); install kornia 0.9 or later"
        )


def _from_kornia_package(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "kornia"


def _check_modules(module: nn.Module, trusted: list[Any]) -> None:
    """Refuse at the first call what is only drawn at the hundredth."""
    kind = type(module)
    name = kind.__name__
    if any(entry is module or entry is kind for entry in trusted):
        return
    if _from_kornia_package(kind):
        if name in _CONTAINERS:
            overrides = getattr(module, "extra_args", None) or {}
            if any(getattr(key, "name", key) in ("INPUT", "IMAGE") for key in overrides):
                raise ConfigError(
                    f"cannot read {name} with `extra_args` for the image; set them on its members"
                )
            for child in module.children():
                _check_modules(child, trusted)
            return
        if name in _TRACKED or name == "Identity":
            return
        if name in _REFUSED:
            raise ConfigError(f"cannot read {name}: {_REFUSED[name]}")
    if kind is nn.Identity or any(
        base.__name__ == "IntensityAugmentationBase2D" and _from_kornia_package(base)
        for base in kind.__mro__
    ):
        return
    raise ConfigError(
        f"cannot read {name}: it is not known whether it moves pixels; if it moves none, vouch for "
        f"it with `trust=[{name}]`"
    )


def _applied(module: Any) -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
    """(module, its parameters) in the order of the last call."""
    container = type(module).__name__ in _CONTAINERS
    if module._params is None or not (container or module._params):
        raise ConfigError(
            f"`augmentation` ({type(module).__name__}) holds no parameters of a call; call it on a "
            "batch first"
        )
    if container:
        yield from _applied_in(module, module._params)
    else:
        yield module, module._params


def _applied_in(
    container: nn.Module, items: Iterable[Any]
) -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
    children = dict(container.named_children())
    for name, data in items:
        child = children[name]
        if isinstance(data, list):
            yield from _applied_in(child, data)
        elif data and "batch_prob" in data:
            yield child, data


def _check_step(module: Any, params: dict[str, Tensor], size: Size) -> None:
    height, width = params["forward_input_shape"][-2:].tolist()
    if "padding_size" in params:  # RandomCrop notes the size after its padding
        left, right, top, bottom = params["padding_size"][0].tolist()
        height, width = height - top - bottom, width - left - right
    if (height, width) != size:
        raise GeometryError(
            f"{type(module).__name__} was given images of {(height, width)} (height, width), and "
            f"`source_size` leads to {size} there; was it called on other images since?"
        )


def _step_matrix(module: Any, params: dict[str, Tensor], size: Size) -> Tensor:
    """(b, 3, 3) float64, input → output, counted from pixel centres; one where not applied."""
    gate = params["batch_prob"]
    # Only its shape, dtype and device are looked at: one number stands for all pixels.
    image = torch.empty((), dtype=torch.float64, device=gate.device).expand(len(gate), 1, *size)
    matrix: Tensor = module.generate_transformation_matrix(image, params, module.flags)
    if type(module).__name__ == "RandomResizedCrop":
        matrix = _spread_single_pixels(matrix, params)
    return matrix.to(torch.float64)


def _spread_single_pixels(matrix: Tensor, params: dict[str, Tensor]) -> Tensor:
    source, view = (params[key].to(matrix) for key in ("src", "dst"))
    matrix = matrix.clone()
    applied = params["batch_prob"] > 0.5
    for axis in (0, 1):
        single = applied & (source[:, 2, axis] == source[:, 0, axis])
        length = view[:, 2, axis] - view[:, 0, axis] + 1
        middle = (length - 1) / 2
        row = matrix[:, axis]
        row = torch.where(single[:, None], torch.zeros_like(row), row)
        row[:, axis] = torch.where(single, length, row[:, axis])
        row[:, 2] = torch.where(single, middle - length * source[:, 0, axis], row[:, 2])
        matrix[:, axis] = row
    return matrix


def _size_after(module: Any, params: dict[str, Tensor], size: Size) -> Size:
    name = type(module).__name__
    if name in _KEEP_SIZE or not bool((params["batch_prob"] > 0.5).any()):
        return size
    if name in _RESIZES:
        height, width = params["output_size"][0].tolist()
        return int(height), int(width)
    height, width = module.flags["size"]
    if name == "PadTo" and not module.flags.get("crop_if_exceeds", True):
        return max(height, size[0]), max(width, size[1])
    return int(height), int(width)
