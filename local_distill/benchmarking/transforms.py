"""The suite `transforms`: DINO's augmentation with and without where the views lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from local_distill.benchmarking.cases import Case, Settings, Way, Work
from local_distill.benchmarking.others import installed
from local_distill.benchmarking.sizes import GLOBAL_VIEWS, LOCAL_VIEWS, SOURCE
from local_distill.errors import ConfigError, require_extra

__all__ = ["transform_cases"]

_PIXELS = {True: 224, False: 96}  # side of global and of local views
_SCALES = {True: (0.4, 1.0), False: (0.05, 0.4)}
_PLAIN = "torchvision, no geometry"
_TRACKED = "torchvision under track"


def transform_cases(settings: Settings) -> Iterator[Case]:
    """Ten views of each image, from PIL images and from uint8 tensors; on the CPU.

    Raises:
        MissingExtraError: torchvision is not installed.
        ConfigError: another device.
    """
    if settings.device.type != "cpu":
        raise ConfigError(f"the suite transforms runs on the CPU, not on {settings.device}")
    require_extra("torchvision", "vision")
    from torchvision.transforms.v2 import functional as F

    tensors = [_photograph(*SOURCE, seed) for seed in range(settings.batch)]
    label = f"b = {settings.batch}, {SOURCE[1]} × {SOURCE[0]} px"
    yield _case(f"{label}: PIL image", [F.to_pil_image(image) for image in tensors])
    yield _case(f"{label}: tensor", tensors)


def _case(name: str, images: Sequence[Any]) -> Case:
    from local_distill.transforms import MultiCrop, MultiView

    pipelines = _dino_pipelines()
    tracked, multi_crop = MultiView(pipelines, num_global=GLOBAL_VIEWS), MultiCrop()
    augmentations: dict[str, Callable[[Any], Any]] = {
        _PLAIN: lambda image: [pipeline(image) for pipeline in pipelines],
        _TRACKED: tracked,
        "MultiCrop": multi_crop,
    }
    if isinstance(images[0], Tensor):
        augmentations |= _kornia_augmentations()

    def check() -> dict[str, str]:
        """Tracking changes no pixel."""
        without = _seeded(augmentations[_PLAIN], images[:1])[0]
        views, _ = _seeded(tracked, images[:1])[0]
        if all(torch.equal(one, other) for one, other in zip(without, views, strict=True)):
            return {}
        return {_TRACKED: f"gives other pixels than {_PLAIN}"}

    pixels = GLOBAL_VIEWS * _PIXELS[True] ** 2 + LOCAL_VIEWS * _PIXELS[False] ** 2
    moved = len(images) * 3 * (SOURCE[0] * SOURCE[1] + 4 * pixels)
    ways = {way: _way(augment, images) for way, augment in augmentations.items()}
    # What resizing and blurring take depends on how they are done: no flops by formula.
    return Case("transforms", name, ways, _PLAIN, Work(0.0, float(moved)), check)


def _way(augment: Callable[[Any], Any], images: Sequence[Any]) -> Way:
    return lambda: _seeded(augment, images)


def _seeded(augment: Callable[[Any], Any], images: Sequence[Any]) -> list[Any]:
    """Each image under its own seed, the same in every call: all calls are the same work."""
    made = []
    with torch.random.fork_rng(devices=[]):
        for seed, image in enumerate(images):
            torch.manual_seed(seed)
            made.append(augment(image))
    return made


def _dino_pipelines() -> list[Any]:
    return [
        _torchvision_pipeline(True, blur_p=1.0, solarize_p=0.0),
        _torchvision_pipeline(True, blur_p=0.1, solarize_p=0.2),
        *[_torchvision_pipeline(False, blur_p=0.5, solarize_p=0.0) for _ in range(LOCAL_VIEWS)],
    ]


def _torchvision_pipeline(is_global: bool, *, blur_p: float, solarize_p: float) -> Any:
    from torchvision.transforms import v2

    from local_distill.transforms.multi_crop import IMAGENET_MEAN, IMAGENET_STD

    return v2.Compose(
        [
            v2.RandomResizedCrop(
                _PIXELS[is_global],
                scale=_SCALES[is_global],
                interpolation=v2.InterpolationMode.BICUBIC,
                antialias=True,
            ),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=blur_p),
            v2.RandomSolarize(128, p=solarize_p),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def _kornia_augmentations() -> dict[str, Callable[[Any], Any]]:
    """The same recipe of kornia's parts, which bring their matrices along; crops are bilinear."""
    kornia = installed("kornia.augmentation")
    if kornia is None:
        return {}
    pipelines = [
        _kornia_pipeline(kornia, True, blur_p=1.0, solarize_p=0.0),
        _kornia_pipeline(kornia, True, blur_p=0.1, solarize_p=0.2),
        *[_kornia_pipeline(kornia, False, blur_p=0.5, solarize_p=0.0) for _ in range(LOCAL_VIEWS)],
    ]

    def augment(image: Tensor) -> list[tuple[Tensor, Any]]:
        values = image[None].float() / 255
        return [(pipeline(values), pipeline.transform_matrix) for pipeline in pipelines]

    return {"kornia, its matrices": augment}


def _kornia_pipeline(kornia: Any, is_global: bool, *, blur_p: float, solarize_p: float) -> Any:
    from local_distill.transforms.multi_crop import IMAGENET_MEAN, IMAGENET_STD

    side = _PIXELS[is_global]
    return kornia.AugmentationSequential(
        kornia.RandomResizedCrop((side, side), scale=_SCALES[is_global]),
        kornia.RandomHorizontalFlip(),
        kornia.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
        kornia.RandomGrayscale(p=0.2),
        kornia.RandomGaussianBlur((13, 13), (0.1, 2.0), p=blur_p),
        kornia.RandomSolarize(thresholds=0.0, additions=0.0, p=solarize_p),
        kornia.Normalize(torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)),
        data_keys=["input"],
    )


def _photograph(height: int, width: int, seed: int) -> Tensor:
    """(3, height, width) uint8: clouds at many scales."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(3, height, width)
    for octave in range(1, 9):
        side = min(2**octave, height, width)
        noise = torch.rand(1, 3, side, side, generator=generator)
        smooth = torch.nn.functional.interpolate(noise, (height, width), mode="bicubic")
        image += smooth[0] * 0.8**octave
    low, high = image.amin((1, 2), keepdim=True), image.amax((1, 2), keepdim=True)
    return ((image - low) / (high - low) * 255).to(torch.uint8)
