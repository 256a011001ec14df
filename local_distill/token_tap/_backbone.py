"""What a backbone says of itself: its modules, where its tokens lie, what stands before them."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from local_distill._check import check_at_least
from local_distill._token_grids import Step, grid_of_steps, known_steps
from local_distill.errors import ConfigError
from local_distill.structures import TokenGrid

# What timm, DINO's family and transformers call the tokens that go before the patches.
_PREFIX_PARAMETERS = frozenset(
    (
        "cls_token",
        "dist_token",
        "distillation_token",
        "reg_token",
        "register_tokens",
        "storage_tokens",
    )
)


def module_of(backbone: nn.Module, name: str) -> nn.Module:
    try:
        return backbone.get_submodule(name)
    except AttributeError as error:
        names = [child for child, _ in backbone.named_modules() if child]
        close = difflib.get_close_matches(name, names, n=4) or [
            child for child in names if "." not in child
        ]
        raise ConfigError(
            f"`module` or `layers`: {type(backbone).__name__} has no module {name!r}; "
            f"it has {', '.join(close)}"
        ) from error


def refuse_compiled(backbone: nn.Module, name: str) -> None:
    """Refuse where the module, or one around it within the backbone, is compiled already."""
    path = name.split(".") if name else []
    for depth in range(len(path) + 1):
        part = backbone.get_submodule(".".join(path[:depth]))
        if getattr(part, "_compiled_call_impl", None) is not None or "_orig_mod" in part._modules:
            raise ConfigError(
                f"`backbone`: its part {'.'.join(path[:depth])!r} ({type(part).__name__}) is "
                "compiled already, and a compiled graph does not look for hooks that were added "
                "later; make the TokenTap first, then call torch.compile"
            )


def default_grid(
    backbone: Any, patch_size: int | tuple[int, int] | None
) -> Callable[[tuple[int, int]], TokenGrid]:
    kind = type(backbone)
    if patch_size is None:
        if callable(own := getattr(backbone, "token_grid", None)):
            return functools.partial(_asked, own)
        steps = known_steps(backbone) if kind.__module__.startswith("timm.") else None
        if steps is not None:
            return functools.partial(grid_of_steps, steps)
    # A stem of overlapping convolutions has its tokens' centres elsewhere (a ResNet's at 32i + 0.5)
    # and the same count of them: no check of shapes would ever see it.
    first = next((part for part in backbone.modules() if isinstance(part, nn.Conv2d)), None)
    if first is not None and not _cuts(first):
        raise ConfigError(
            f"`grid`: {kind.__name__} begins with {first}, which does not cut a view into patches, "
            "so a patch size does not say where the tokens lie; give `grid`, such as "
            "TimmBackbone(model).token_grid or what measure_token_grid finds"
        )
    size: Any = patch_size
    if size is None and first is not None:
        size = first.kernel_size
    if size is None:
        raise ConfigError(
            f"`patch_size`: {kind.__name__} has no convolution that would say how large its "
            "patches are; give `patch_size`, or `grid` if its tokens are not the cells of a view "
            "cut into patches"
        )
    height, width = (size, size) if isinstance(size, int) else size
    return _PatchGrid(
        check_at_least("patch_size", height, 1), check_at_least("patch_size", width, 1)
    )


def count_prefix_tokens(backbone: Any) -> int:
    own = getattr(backbone, "num_prefix_tokens", None)  # timm's
    if isinstance(own, int):
        return own
    return sum(
        int(parameter.shape[-2])
        for name, parameter in backbone.named_parameters()
        if name.rpartition(".")[2] in _PREFIX_PARAMETERS and parameter.dim() >= 2
    )


class _PatchGrid:
    """The grid of a view that is cut into patches from its upper left corner."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width

    def __call__(self, view_size: tuple[int, int]) -> TokenGrid:
        cut = Step((self.height, self.width), (self.height, self.width))
        return grid_of_steps([cut], view_size)


def _asked(token_grid: Any, view_size: tuple[int, int]) -> TokenGrid:
    found = token_grid(view_size)
    if not isinstance(found, TokenGrid):
        raise ConfigError(
            f"`grid`: the backbone's own `token_grid` gives {type(found).__name__}, not a "
            "TokenGrid; give `grid` or `patch_size`"
        )
    return found


def _cuts(convolution: nn.Conv2d) -> bool:
    padded = convolution.padding not in ((0, 0), "valid")
    return (
        convolution.kernel_size == convolution.stride
        and not padded
        and convolution.dilation == (1, 1)
    )
