"""Pictures while a run goes on: the same few images at every step, so that they can be compared."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from local_distill._check import check_at_least
from local_distill.backbones import TimmBackbone
from local_distill.errors import ConfigError, DataError, ShapeError
from local_distill.structures import CropGeometry
from local_distill.training.match_picture import match_picture, patch_tokens
from local_distill.training.views import eval_transform
from local_distill.transforms.multi_crop import IMAGENET_MEAN, IMAGENET_STD
from local_distill.viz.figures import denormalize
from local_distill.viz.principal_colors import principal_figure

__all__ = ["RunPictures"]

_log = logging.getLogger(__name__)


class RunPictures:
    """Draws matches and patch tokens of a few images whenever it is asked to.

    The images, and one draw of their views, are fixed when this object is made: what changes from
    one step's pictures to the next is the network alone. Global random numbers, the backbone's
    modes and gradients stay as they are, so that a run with pictures learns what it learns without.

    Args:
        folder: of the run; the pictures go to its folder ``pictures``.
        images: gives (PIL image, label); ``count`` of them are chosen by the seed.
        views: image → (views, geometries), such as `MultiCrop`.
        seed: of the choice and of the views.
        count: images whose tokens are shown as colours; matches are shown for the first.
        num_global: views that the teacher sees; None: ``views.num_global``.
        token_size: side in pixels at which tokens are shown as colours; None: twice that of the
            first view, or its own where the network takes no other.

    Raises:
        ConfigError: no images, a count below 1, views that do not say how many are global.

    Example:
        >>> import tempfile
        >>> from local_distill.backbones import tiny_vit
        >>> from local_distill.training import DemoCrop, SyntheticScenes
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pictures = RunPictures(folder, SyntheticScenes(9, 32), DemoCrop(), seed=0, count=2)
        ...     [path.name for path in pictures.draw(200, tiny_vit(depth=1))]
        ['step-00000200-matches.png', 'step-00000200-tokens.png']
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        images: Dataset[tuple[Any, int]] | Sequence[tuple[Any, int]],
        views: Callable[[Any], tuple[Sequence[Tensor], Sequence[CropGeometry]]],
        *,
        seed: int = 0,
        count: int = 4,
        num_global: int | None = None,
        token_size: int | None = None,
    ) -> None:
        check_at_least("count", count, 1)
        total = len(images)  # type: ignore[arg-type]
        if total == 0:
            raise ConfigError("`images` is empty: there is nothing to draw")
        num_global = getattr(views, "num_global", None) if num_global is None else num_global
        if num_global is None:
            raise ConfigError(
                f"`num_global`: {type(views).__name__} does not say how many of its views the "
                "teacher sees; pass num_global="
            )
        self.folder = Path(folder) / "pictures"
        self.num_global = check_at_least("num_global", num_global, 1)
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
        with _own_random_numbers(seed):
            self._sources = [images[index][0] for index in order[:count]]
            self._views, self._geometries = views(self._sources[0])
        self._normalize = getattr(views, "normalize", None)
        side = min(int(self._views[0].shape[-2]), int(self._views[0].shape[-1]))
        self._token_sizes = [2 * side, side] if token_size is None else [token_size]

    def draw(self, step: int, backbone: TimmBackbone) -> list[Path]:
        """Write both pictures of a step.

        Geometric matches stand beside similarity matches, whatever the run is trained with. It
        takes a few seconds, most of them matplotlib's.

        Args:
            step: names the files.
            backbone: the one to look at, best the teacher's.

        Returns:
            The files written: ``step-00000200-matches.png`` and ``step-00000200-tokens.png``.
            A picture that cannot be drawn or written (NaN features, a full disk) is told to the
            log and left out: a run is not lost to it.
        """
        drawings = {"matches": self._matches, "tokens": self._tokens}
        written = []
        with _own_random_numbers(0), _evaluated(backbone), torch.no_grad():
            for name, drawing in drawings.items():
                path = self.folder / f"step-{step:08d}-{name}.png"
                try:
                    _write(drawing(backbone, step), path)
                except (DataError, OSError) as error:
                    _log.warning("no picture %s: %s", path, error)
                else:
                    written.append(path)
        return written

    def _matches(self, backbone: TimmBackbone, step: int) -> Any:
        figure = match_picture(
            backbone,
            self._sources[0],
            self._views,
            self._geometries,
            self.num_global,
            normalize=self._normalize,
        )
        figure.suptitle(f"step {step}", fontsize=11)
        return figure

    def _tokens(self, backbone: TimmBackbone, step: int) -> Any:
        for size in self._token_sizes:
            try:
                grid = backbone.token_grid((size, size))
            except ShapeError:
                if size == self._token_sizes[-1]:
                    raise
                continue  # built for one size
            break
        transform = eval_transform(size)
        images = torch.stack([transform(source) for source in self._sources])
        features = patch_tokens(backbone, images)
        figure = principal_figure(
            list(denormalize(images, IMAGENET_MEAN, IMAGENET_STD)), features, [grid] * len(images)
        )
        figure.suptitle(f"step {step}", fontsize=11)
        return figure


def _write(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(str(aside), dpi=90, format="png")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def _own_random_numbers(seed: int) -> Iterator[None]:
    """Seed what views may draw from, and put it back; CUDA's generators are not touched."""
    python, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed CUDA as well
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def _evaluated(network: nn.Module) -> Iterator[None]:
    """Evaluation mode, and each module's own mode back: a frozen part may have been in another."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
