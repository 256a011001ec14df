"""The views back out of what a multi-crop wrapper has put behind one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from local_distill._check import Axes, check_at_least
from local_distill.errors import ShapeError

__all__ = [
    "SplitView",
    "split_class_and_patches",
    "split_crop_groups",
    "split_regions",
    "split_views",
]

# What DINOv2 (first) and DINOv3 call their register tokens.
_REGISTERS = ("x_norm_regtokens", "x_storage_tokens")


class SplitView(NamedTuple):
    """What a wrapper's output says of one view.

    Attributes:
        class_token: (b, d), features or logits of the whole view.
        patch_tokens: (b, n, d'), of its patches.
        register_tokens: (b, r, d), or None where the output has none.
    """

    class_token: Tensor
    patch_tokens: Tensor
    register_tokens: Tensor | None = None


def split_views(output: Tensor, views: int) -> list[Tensor]:
    """One tensor a view, out of a tensor with the views' batches one after the other.

    Convention: view-major, as DINO's ``MultiCropWrapper`` and all that follow it: the first b rows
    are view 0 of all images. What ``chunk`` does, but a count that does not fit is an error.

    Args:
        output: (v·b, ...), logits, class tokens, or patch tokens (v·b, n, d).
        views: v.

    Returns:
        v tensors (b, ...), which are views of ``output``: the gradient flows.

    Raises:
        ShapeError: the rows cannot be cut into so many views.

    Example:
        >>> import torch
        >>> logits = torch.arange(6.0)[:, None]  # 3 views of 2 images
        >>> [view[:, 0].tolist() for view in split_views(logits, 3)]
        [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]

    Source: facebookresearch/dino, ``utils.MultiCropWrapper``.
    """
    return _split("output", output, views)


def split_class_and_patches(
    output: Tensor | tuple[Tensor, Tensor], views: int, *, num_prefix_tokens: int = 1
) -> list[SplitView]:
    """Class token and patch tokens of each view, as iBOT's wrapper and heads have them.

    Convention: view-major. iBOT runs its global and its local views apart, as local views' patches
    are another count: call this for each.

    Args:
        output: tokens (v·b, p + n, d), [CLS] first, as the backbone gives them; or the pair
            (v·b, c), (v·b, n, c') of iBOT's head.
        views: v, of this output.
        num_prefix_tokens: p ≥ 1, [CLS] and the registers behind it; of tokens only.

    Returns:
        `SplitView` per view; registers where p > 1.

    Raises:
        ShapeError: the rows cannot be cut into so many views, or the pair's rows differ.
        ConfigError: p below 1.

    Example:
        >>> import torch
        >>> views = split_class_and_patches(torch.zeros(2 * 3, 1 + 4, 8), 2)
        >>> [(tuple(view.class_token.shape), tuple(view.patch_tokens.shape)) for view in views]
        [((3, 8), (3, 4, 8)), ((3, 8), (3, 4, 8))]

    Source: bytedance/ibot, ``utils.MultiCropWrapper``, ``iBOTHead.forward``.
    """
    if isinstance(output, Tensor):
        check_at_least("num_prefix_tokens", num_prefix_tokens, 1)
        tokens = Axes().bind("output", output, "rows tokens d")
        if tokens.shape[1] <= num_prefix_tokens:
            raise ShapeError(
                f"`output` has {tokens.shape[1]} tokens, of which {num_prefix_tokens} stand before "
                "the patches: none are left; does the wrapper return [CLS] alone?"
            )
        registers = tokens[:, 1:num_prefix_tokens] if num_prefix_tokens > 1 else None
        return _views_of("output", tokens[:, 0], tokens[:, num_prefix_tokens:], registers, views)
    if len(output) != 2:
        raise ShapeError(
            f"`output` must be tokens or the pair (class, patches), got {len(output)} entries"
        )
    axes = Axes()
    classes = axes.bind("output[0]", output[0], "rows c")
    patches = axes.bind("output[1]", output[1], "rows n e")
    return _views_of("output", classes, patches, None, views)


def split_regions(
    output: Tensor, tokens_per_size: Sequence[int], views_per_size: Sequence[int]
) -> list[Tensor]:
    """The regions of each view, out of EsViT's one table of all regions of all views.

    Convention: sizes one after the other, each view-major: rows run over (size, view, image,
    token). EsViT's wrapper returns the tokens per size (``npatch``), not how many views had it.

    Args:
        output: (Σ v_r·b·n_r, c), region logits or region features.
        tokens_per_size: n_r of each resolution, in the order in which the wrapper ran them.
        views_per_size: v_r of each, EsViT's being (2, number of local crops).

    Returns:
        Σ v_r tensors (b, n_r, c), in view order.

    Raises:
        ShapeError: lists of different length, or a table that does not hold whole views.
        ConfigError: a count below 1.

    Example:
        >>> import torch
        >>> table = torch.zeros(2 * 3 * 49 + 8 * 3 * 9, 16)  # 2 + 8 views of 3 images
        >>> regions = split_regions(table, (49, 9), (2, 8))
        >>> len(regions), regions[0].shape, regions[9].shape
        (10, torch.Size([3, 49, 16]), torch.Size([3, 9, 16]))

    Source: microsoft/esvit, ``utils.MultiCropWrapper``, ``DDINOLoss.forward``.
    """
    table = Axes().bind("output", output, "rows c")
    tokens, views = list(tokens_per_size), list(views_per_size)
    if len(tokens) != len(views) or not tokens:
        raise ShapeError(
            "`tokens_per_size` and `views_per_size` must have one entry per resolution each, got "
            f"{len(tokens)} and {len(views)}"
        )
    for name, counts in (("tokens_per_size", tokens), ("views_per_size", views)):
        for count in counts:
            check_at_least(name, count, 1)
    of_an_image = sum(v * n for v, n in zip(views, tokens, strict=True))
    batch, rest = divmod(table.shape[0], of_an_image)
    if rest:
        raise ShapeError(
            f"`output` has {table.shape[0]} rows, no multiple of the {of_an_image} regions that an "
            f"image has in {views} views of {tokens} tokens; give the counts that the wrapper had"
        )
    of_views = [n for v, n in zip(views, tokens, strict=True) for _ in range(v)]
    parts = torch.split(table, [batch * n for n in of_views])
    return [part.reshape(batch, n, -1) for part, n in zip(parts, of_views, strict=True)]


def split_crop_groups(
    outputs: Sequence[Mapping[str, Tensor | None]], views: Sequence[int]
) -> list[SplitView]:
    """Class, patch and register tokens of each view, as DINOv2 and DINOv3 return them.

    Convention: global and local crops are two tensors, each view-major, and the backbone gives a
    dict for each. DINOv2's loss swaps the teacher's two *class* tokens after this; its patch tokens
    stay in view order, and so does all that this function takes.

    Args:
        outputs: the backbone's dicts, ``x_norm_clstoken`` (v·b, d) and ``x_norm_patchtokens``
            (v·b, n, d), registers as ``x_norm_regtokens`` (DINOv2) or ``x_storage_tokens``
            (DINOv3) if any; global crops first. For a teacher a list of the one dict.
        views: v of each, such as (2, 8).

    Returns:
        `SplitView` per view, in view order.

    Raises:
        ShapeError: a key is missing, a dict's rows cannot be cut into so many views, or the dicts
            are of different batches.

    Example:
        >>> import torch
        >>> def output(rows, tokens):
        ...     return {
        ...         "x_norm_clstoken": torch.zeros(rows, 8),
        ...         "x_norm_patchtokens": torch.zeros(rows, tokens, 8),
        ...     }
        >>> views = split_crop_groups([output(2 * 3, 16), output(4 * 3, 4)], (2, 4))
        >>> [view.patch_tokens.shape[1] for view in views]
        [16, 16, 4, 4, 4, 4]

    Source: facebookresearch/dinov2 and dinov3, ``ssl_meta_arch``, ``collate_data_and_cast``.
    """
    if isinstance(outputs, Mapping):
        raise ShapeError("`outputs` must be a list of the backbone's dicts; wrap one as [outputs]")
    if len(outputs) != len(views) or not views:
        raise ShapeError(
            f"`views` must say of each of the {len(outputs)} `outputs` how many views it holds, "
            f"got {len(views)} counts"
        )
    found: list[SplitView] = []
    for place, (output, count) in enumerate(zip(outputs, views, strict=True)):
        axes = Axes()
        parts: list[Tensor] = []
        for key, wanted in (("x_norm_clstoken", "rows d"), ("x_norm_patchtokens", "rows n d")):
            if key not in output:
                raise ShapeError(
                    f"`outputs[{place}]` has no {key!r}, only {sorted(output)}; call the backbone "
                    "with is_training=True"
                )
            parts.append(axes.bind(f"outputs[{place}][{key!r}]", output[key], wanted))
        registers = next((output[key] for key in _REGISTERS if output.get(key) is not None), None)
        if registers is not None:
            axes.bind(f"outputs[{place}]'s registers", registers, "rows r d")
        group = _views_of(f"outputs[{place}]", parts[0], parts[1], registers, count)
        if found and group[0].class_token.shape[0] != found[0].class_token.shape[0]:
            raise ShapeError(
                f"`outputs[{place}]` holds {group[0].class_token.shape[0]} images in {count} "
                f"views, but `outputs[0]` {found[0].class_token.shape[0]}; give as `views` how "
                "many each of them holds"
            )
        found.extend(group)
    return found


def _views_of(
    name: str, classes: Tensor, patches: Tensor, registers: Tensor | None, views: int
) -> list[SplitView]:
    split = [_split(name, part, views) for part in (classes, patches)]
    of_registers = [None] * views if registers is None else _split(name, registers, views)
    return [SplitView(*view) for view in zip(*split, of_registers, strict=True)]


def _split(name: str, output: Tensor, views: int) -> list[Tensor]:
    check_at_least("views", views, 1)
    if not isinstance(output, Tensor) or output.dim() < 1:
        raise ShapeError(f"`{name}` must be a tensor (views * b, ...), got {output!r}")
    if output.shape[0] % views:
        raise ShapeError(
            f"`{name}` has {output.shape[0]} rows, no multiple of {views} views; give as `views` "
            "how many views went into the wrapper"
        )
    return list(torch.tensor_split(output, views))
