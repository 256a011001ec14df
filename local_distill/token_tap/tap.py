"""Patch tokens out of a backbone that somebody else's code calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from local_distill._check import check_at_least
from local_distill.errors import ConfigError, ShapeError
from local_distill.structures import CropGeometry, TokenGrid, Tokens
from local_distill.token_tap._backbone import (
    count_prefix_tokens,
    default_grid,
    module_of,
    refuse_compiled,
)
from local_distill.token_tap._views import (
    check_numbers,
    check_view,
    given_views,
    image_sizes,
    split_tokens,
    tensor_of,
)
from local_distill.token_tap._waiting import Forward, Waiting

__all__ = ["TappedView", "TokenTap"]

# Forwards whose tokens nobody took: more are a forgotten `take`, and would fill the memory.
_MOST_WAITING = 64


class TappedView(NamedTuple):
    """What a `TokenTap` saw of one view.

    Attributes:
        tokens: the view's `Tokens`: features (b, n, d), geometry where it was given, grid.
        prefix: (b, p, d), what stands before the patch tokens: [CLS], registers.
        layers: of each layer that was asked for its patch tokens (b, n, d), in that order, as they
            leave it: of a ViT's block that is before the final norm.
        layer_prefixes: of each layer (b, p, d).
    """

    tokens: Tokens
    prefix: Tensor
    layers: tuple[Tensor, ...] = ()
    layer_prefixes: tuple[Tensor, ...] = ()


class TokenTap:
    """Collects the patch tokens of a backbone over the forwards of a step, in view order.

    Multi-crop wrappers call their backbone once for each resolution, with the views of that size
    one after the other in the batch, and keep only the global token. The tap listens to a module
    inside (the final norm of a ViT) and hands out, view by view, what went past. It adds nothing to
    the model: no parameter, no name in the state dict.

    In evaluation (``backbone.eval()``) it collects nothing, and the first forward there makes it
    let go of what it has; a teacher that is kept in eval mode, as DINOv2's, takes ``in_eval=True``.
    A copy of the model (``copy.deepcopy``, an EMA teacher, one out of a file) is not tapped: give
    it a tap of its own. What activation checkpointing runs again is not collected again.

    Make it before torch.compile, and before or after DDP and FSDP2 (``fully_shard``).

    Args:
        backbone: what takes the images, as the first argument or by name: (b, c, h, w), or a list
            of such tensors. Its ``forward`` must be what is called: ``forward_features`` runs no
            hooks.
        module: name of the module inside whose output is tokens (b, p + n, d) or a map
            (b, d, rows, cols) or, as timm's Swin has it, (b, rows, cols, d); "" for the backbone's
            own output. A tuple is asked for its first entry, a model output or a dict for
            ``last_hidden_state``.
        layers: names of further modules whose tokens have the same grid, first layer first.
        patch_size: side of a patch in pixels, (height, width) where they differ. Default: what
            the backbone's first convolution says, if it cuts the view into patches.
        num_prefix_tokens: p, of what stands before the patch tokens. Default: the backbone's
            ``num_prefix_tokens``, else the sizes of its parameters ``cls_token``,
            ``register_tokens`` and the like. What stands behind the patches is not looked for.
        grid: view size (height, width) → `TokenGrid`, for a backbone whose tokens are not the cells
            of a view cut into patches: ``TimmBackbone(model).token_grid``, or
            `measure_token_grid`. Default: the backbone's own ``token_grid``, timm's strides for
            the families that `TimmBackbone` has formulas for, else by ``patch_size``.
        in_eval: also collect while the backbone is in evaluation mode.

    Attributes:
        enabled: may be set to False for a while (the evaluation of a teacher with ``in_eval``):
            then nothing is collected.
        num_prefix_tokens: p.

    Raises:
        ConfigError: no such module, no patch size, a patch size of a backbone that does not cut
            its views into patches, DataParallel, or a module that is compiled already.

    Example:
        >>> from local_distill.backbones import tiny_vit
        >>> backbone = tiny_vit(patch_size=8).model
        >>> tap = TokenTap(backbone, "norm")
        >>> views = [torch.zeros(2, 3, 48, 48)] * 2 + [torch.zeros(2, 3, 24, 24)] * 3
        >>> for size in (views[:2], views[2:]):  # as a multi-crop wrapper does
        ...     _ = backbone(torch.cat(size))
        >>> tokens = tap.take(5)
        >>> [tuple(view.features.shape) for view in tokens]
        [(2, 36, 96), (2, 36, 96), (2, 9, 96), (2, 9, 96), (2, 9, 96)]
        >>> tokens[4].grid
        TokenGrid(rows=3, cols=3, stride=(8.0, 8.0), offset=(4.0, 4.0))
    """

    def __init__(
        self,
        backbone: nn.Module,
        module: str = "norm",
        *,
        layers: Sequence[str] = (),
        patch_size: int | tuple[int, int] | None = None,
        num_prefix_tokens: int | None = None,
        grid: Callable[[tuple[int, int]], TokenGrid] | None = None,
        in_eval: bool = False,
    ) -> None:
        if isinstance(backbone, nn.DataParallel):
            raise _no_data_parallel()
        names = (module, *layers)
        tapped = [module_of(backbone, name) for name in names]
        for name in names:
            refuse_compiled(backbone, name)
        self.enabled, self.in_eval, self._names = True, in_eval, names
        self._grid = default_grid(backbone, patch_size) if grid is None else grid
        self._grids: dict[tuple[int, int], TokenGrid] = {}
        self.num_prefix_tokens = check_at_least(
            "num_prefix_tokens",
            count_prefix_tokens(backbone) if num_prefix_tokens is None else num_prefix_tokens,
            0,
        )
        self._waiting = Waiting(None, None)
        self._images: list[tuple[int, int, int]] = []  # of the forward that runs
        self._seen: list[list[Tensor]] = []
        self._open = False  # within a forward that is collected
        self._grad = self._had_grad = False  # of this forward, of any so far
        self._handles: list[RemovableHandle] = [
            backbone.register_forward_pre_hook(_Hook(self._begin), with_kwargs=True),
            *(
                part.register_forward_hook(_Hook(functools.partial(self._see, place)))
                for place, part in enumerate(tapped)
            ),
            # called where the forward fails as well, so that no half of a step is left behind
            backbone.register_forward_hook(_Hook(self._end), always_call=True),
        ]

    def grid(self, view_size: tuple[int, int]) -> TokenGrid:
        """Where the patch tokens lie in a view of (height, width) pixels."""
        if view_size not in self._grids:
            self._grids[view_size] = self._grid(view_size)
        return self._grids[view_size]

    def take(self, views: int | Sequence[CropGeometry] | Sequence[Tensor]) -> list[Tokens]:
        """The tokens of every view since the last call, and forget them.

        Args:
            views: the views' geometries in view order, on whatever device (they come back on the
                tokens'); or the views (b, c, h, w) themselves; or how many there were. A count
                cannot tell two steps from one of twice the batch: where a step may be left out,
                give the others, or call `clear` there.

        Returns:
            `Tokens` per view, in view order.

        Raises:
            ShapeError: the forwards since the last call do not hold so many views of one batch,
                a geometry or a view is of another size or batch, or the module's output does not
                fit the grid.
        """
        return [view.tokens for view in self.take_views(views)]

    def take_views(
        self, views: int | Sequence[CropGeometry] | Sequence[Tensor]
    ) -> list[TappedView]:
        """As `take`, with what stands before the patch tokens, and with the layers."""
        forwards = self._waiting.forwards()
        self.clear()
        given = given_views(views)
        if not forwards:
            raise ShapeError(
                "`views`: no forward was collected since the last `take`. The tap listens while "
                "`backbone.training` (or with in_eval=True) and while it is `enabled`, to calls of "
                "this very backbone (not of a copy) through its forward, not through "
                "`forward_features`; and a model that was compiled and has run before the tap was "
                "made does not see it"
            )
        sizes = [forward.images[0] for forward in forwards]
        check_numbers(given, sum(sizes))
        batch, rest = divmod(sum(sizes), len(given))
        if rest or not batch or any(size % batch for size in sizes):
            raise ShapeError(
                f"`views`: {len(given)} views cannot be cut from the forwards since the last "
                f"`take`, which had {sizes} images; take after every step what the wrapper was "
                "given, and `clear` where a step is left out"
            )
        found: list[TappedView] = []
        for forward in forwards:
            view_size = int(forward.images[1]), int(forward.images[2])
            for start in range(0, forward.images[0], batch):
                view = given[len(found)]
                check_view(len(found), view, view_size, batch)
                found.append(self._view(forward, view_size, slice(start, start + batch), view))
        return found

    def clear(self) -> None:
        """Forget what was not taken."""
        self._waiting = Waiting(None, None)

    def remove(self) -> None:
        """Stop listening, for good."""
        self.enabled = False  # graphs that were compiled with the hooks look at this
        for handle in self._handles:
            handle.remove()
        self.clear()

    def __repr__(self) -> str:
        waiting = self._waiting.count
        return f"TokenTap({', '.join(map(repr, self._names))}; {waiting} forwards wait)"

    def __getstate__(self) -> dict[str, Any]:
        # A copy listens to nothing, as the copied model's hooks do nothing.
        nothing = {"_handles": [], "_seen": [], "_open": False, "enabled": False}
        return {**self.__dict__, **nothing, "_waiting": Waiting(None, None)}

    def _begin(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(backbone, "_is_replica", False):
            raise _no_data_parallel()
        self._grad = torch.is_grad_enabled()
        if _in_backward():  # activation checkpointing runs the whole backbone again
            self._open = False
            if self._grad and not self._had_grad:
                raise _checkpointed(type(backbone).__name__)
            return
        self._open = self.enabled and (backbone.training or self.in_eval)
        if not self._open:
            self.clear()
            return
        self._images = image_sizes([*args, *kwargs.values()])
        self._seen = [[] for _ in self._names]

    def _see(self, place: int, module: nn.Module, args: Any, output: Any) -> None:
        if not self._open or _in_backward():
            return
        if self._grad and not torch.is_grad_enabled():
            raise _checkpointed(self._names[place])
        name, count = self._names[place], len(self._images)
        if isinstance(output, list) and 1 < count == len(output):  # DINOv2's blocks
            self._seen[place].extend([tensor_of(part, name) for part in output])
        else:
            self._seen[place].append(tensor_of(output, name))

    def _end(self, backbone: nn.Module, args: Any, output: Any) -> None:
        if not self._open:
            return
        self._open = False
        seen, self._seen = self._seen, []
        if output is None:  # the forward failed
            self.clear()
            return
        for name, outputs in zip(self._names, seen, strict=True):
            if len(outputs) != len(self._images):
                self.clear()
                raise ConfigError(
                    f"`module`: {name!r} ran {len(outputs)} times in a forward of "
                    f"{len(self._images)} batches of images; tap a module that runs once for each, "
                    "and give as `backbone` what takes the images, not the wrapper that calls it"
                )
        for images, output_of_images, *layers in zip(self._images, *seen, strict=True):
            forward = Forward(images, output_of_images, tuple(layers))
            self._waiting = Waiting(self._waiting, forward)
        if self._grad:
            self._had_grad = True
        if self._waiting.count > _MOST_WAITING:
            self.clear()
            raise ConfigError(
                f"the tokens of {_MOST_WAITING} forwards wait to be taken; call `take` after every "
                "step, `clear` where they are of no use, or put the backbone into evaluation mode "
                "(with in_eval=True: set the tap's `enabled` to False)"
            )

    def _view(
        self,
        forward: Forward,
        view_size: tuple[int, int],
        rows: slice,
        view: CropGeometry | Tensor | None,
    ) -> TappedView:
        grid, images = self.grid(view_size), int(forward.images[0])
        (prefix, tokens), *layers = [
            split_tokens(values, images, rows, grid, self.num_prefix_tokens, name)
            for values, name in zip((forward.output, *forward.layers), self._names, strict=True)
        ]
        # loaders leave geometries on the CPU, which is where their sizes can be looked at for free
        geometry = view.to(tokens.device) if isinstance(view, CropGeometry) else None
        return TappedView(
            Tokens(tokens, geometry, grid),
            prefix,
            tuple(patches for _, patches in layers),
            tuple(first for first, _ in layers),
        )


class _Hook:
    """A hook that stays with this model: in a copy, or out of a file, it does nothing."""

    def __init__(self, act: Callable[..., None] | None) -> None:
        self.act = act

    def __call__(self, *args: Any) -> None:
        if self.act is not None:
            self.act(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook(None)

    def __reduce__(self) -> tuple[type[_Hook], tuple[None]]:
        return _Hook, (None,)


def _no_data_parallel() -> ConfigError:
    return ConfigError(
        "`backbone`: DataParallel runs replicas in threads, whose tokens would come in any order "
        "and from several devices; use DistributedDataParallel"
    )


def _checkpointed(name: str) -> ConfigError:
    return ConfigError(
        f"`module` or `layers`: {name!r} ran without gradients in a forward with gradients, so its "
        "tokens would teach the backbone nothing: activation checkpointing with use_reentrant=True "
        "does that; say use_reentrant=False, or tap a module outside the checkpointed part"
    )


def _in_backward() -> bool:
    """Whether autograd runs, so that what runs here is what checkpointing runs again."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1
