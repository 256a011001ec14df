"""timm models as backbones: global token, patch tokens, where the tokens lie, per-layer tokens."""

from __future__ import annotations

import copy
import difflib
import hashlib
import logging
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from local_distill._check import Axes, check_at_least, check_floating
from local_distill._token_grids import (
    grid_of_steps,
    known_steps,
    measure_token_grid,
    squarest_shape,
)
from local_distill.errors import ConfigError, ShapeError, require_extra
from local_distill.structures import TokenGrid

__all__ = ["BackboneOutput", "TimmBackbone", "measure_token_grid", "tiny_vit"]

_logger = logging.getLogger(__name__)

# With fewer tokens along an axis a measurement is poor; so many pixels more then bring a few, and
# leave the remainder of the size to any stride up to 64 as it was.
_FEW_TOKENS, _MORE_PIXELS = 6, 128

# Measured once a process, architecture and view size. Not on disk: it is a matter of seconds, and a
# file would outlive the version of timm that it was true for.
_measured_grids: dict[tuple[str, frozenset[type], int, int], TokenGrid] = {}

# What makes one instance of a family take views of any size, by the timm module that defines it.
_ANY_SIZE: dict[str, dict[str, Any]] = {
    "deit": {"dynamic_img_size": True},
    "eva": {"dynamic_img_size": True},
    "swin_transformer": {"strict_img_size": False},
    "swin_transformer_v2": {"strict_img_size": False},
    "vision_transformer": {"dynamic_img_size": True},
}


class BackboneOutput(NamedTuple):
    """What a backbone says of a batch of views: tensors only, the grid comes from `token_grid`.

    Attributes:
        global_token: (b, d), the whole view.
        patch_tokens: (b, rows·cols, d), row-major.
        layers: per block (ViT) or per stage (Swin, ConvNeXt, ResNet) the global token (b, d_l),
            last layer last and equal to ``global_token``; empty unless asked for.
        patch_layers: likewise the patch tokens (b, n_l, d_l), last layer last and equal to
            ``patch_tokens``. Blocks of a ViT share one grid; stages have finer ones below.
    """

    global_token: Tensor
    patch_tokens: Tensor
    layers: tuple[Tensor, ...] = ()
    patch_layers: tuple[Tensor, ...] = ()


class TimmBackbone(nn.Module):
    """A timm model that gives a global token and patch tokens, and says where the latter lie.

    Convention: the global token is the class token after the final norm where there is one, else
    timm's own pooling. Patch tokens come after the final norm, without class and register tokens;
    where timm puts that norm behind the pooling (ConvNeXt, average-pooled ViTs), it is applied to
    each token. Tokens of lower ViT blocks pass the final norm as well; those of lower stages of
    Swin, ConvNeXt and ResNet are plain means over the view.

    A view whose sides a ViT or Swin patch does not divide is cropped at its right and bottom edge
    (patch 14 at 96 px: 6 × 6 tokens, the last 12 px unseen), as a strided convolution would;
    ``dynamic_img_pad=True`` pads it there with zeros instead (7 × 7), which timm offers for ViTs.

    Args:
        name: a timm model name such as ``"vit_small_patch16_224"``, or a model already built.
        pretrained: load timm's weights for that name (this downloads them).
        layers: also give the global token of every block or stage, from the same forward pass.
        patch_layers: also give their patch tokens.
        **timm_kwargs: passed on to ``timm.create_model``. ViT and Swin are told to take any view
            size unless you say otherwise; there is no classifier (``num_classes=0``).

    Attributes:
        model: the timm model.
        embed_dim: d.
        layer_dims: d_l of each entry of ``layers``; empty unless asked for.

    Raises:
        MissingExtraError: timm is not installed.
        ConfigError: an unknown model name, or arguments that the model refuses.

    Example:
        >>> import torch
        >>> backbone = TimmBackbone("resnet18")
        >>> out = backbone(torch.zeros(2, 3, 96, 160))
        >>> out.global_token.shape, out.patch_tokens.shape
        (torch.Size([2, 512]), torch.Size([2, 15, 512]))
        >>> backbone.token_grid((96, 160))
        TokenGrid(rows=3, cols=5, stride=(32.0, 32.0), offset=(0.5, 0.5))
    """

    def __init__(
        self,
        name: str | nn.Module,
        *,
        pretrained: bool = False,
        layers: bool = False,
        patch_layers: bool = False,
        **timm_kwargs: Any,
    ) -> None:
        super().__init__()
        if isinstance(name, nn.Module):
            if pretrained or timm_kwargs:
                given = ["pretrained"] * pretrained + list(timm_kwargs)
                raise ConfigError(
                    f"`name` is a model already built, so {given} cannot take effect; pass them "
                    "where the model is built"
                )
            self.model = name
        else:
            self.model = _create(name, pretrained, timm_kwargs)
        model: Any = self.model
        for needed in ("forward_features", "forward_head", "num_features"):
            if not hasattr(model, needed):
                raise ConfigError(
                    f"`name` must be a timm model, got {type(model).__name__} without `{needed}`"
                )
        self.embed_dim = int(model.num_features)
        self._prefix = int(getattr(model, "num_prefix_tokens", 0))
        self._class_token = (
            self._prefix > 0
            and getattr(model, "cls_token", None) is not None
            and getattr(model, "attn_pool", None) is None
        )
        self._channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        timm_layers = require_extra("timm.layers", "train")
        head = getattr(model, "head", None)
        self._norm_in_head = isinstance(head, timm_layers.NormMlpClassifierHead)
        self._in_chans = _in_chans(model)
        self._steps = known_steps(model)
        self._least = _least_size(model, self._steps)
        self._multiple, self._fixed_size = _size_limits(model)
        self._grids: dict[tuple[int, int], TokenGrid] = {}
        self.layer_dims = _layer_dims(model) if layers or patch_layers else ()
        self._wanted = layers, patch_layers

    def forward(self, images: Tensor) -> BackboneOutput:
        """The tokens of a batch of views of one size.

        Args:
            images: (b, channels, height, width), floating point.

        Returns:
            `BackboneOutput`.

        Raises:
            ShapeError: a wrong rank, channel count or dtype, or a size that the model cannot take.
        """
        images = Axes().bind("images", images, f"b {self._in_chans} h w")
        check_floating("images", images)
        height, width = images.shape[-2:]
        self._check_size("images", height, width)
        images = self._without_remainder(images)
        # A share without images (the last step of an epoch on several processes): timm's ViTs take
        # no empty batch. An image stands in; but no BatchNorm may see it, and convolutional models
        # take an empty batch.
        stand_in = len(images) == 0 and not _has_batch_norm(self.model)
        if stand_in:
            images = images.new_zeros(1, *images.shape[1:])
        model: Any = self.model
        if not self.layer_dims:
            features, intermediates = model.forward_features(images), []
        elif self._prefix or self._is_sequence_model():
            features, intermediates = model.forward_intermediates(
                images, output_fmt="NLC", return_prefix_tokens=True
            )
        else:
            features, intermediates = model.forward_intermediates(
                images, indices=len(self.layer_dims)
            )
        patch_tokens = self._patch_tokens(features)
        global_token = self._global_token(features, patch_tokens)
        lower = intermediates[:-1]
        whole, patches = (wanted and bool(self.layer_dims) for wanted in self._wanted)
        output = BackboneOutput(
            global_token,
            patch_tokens,
            (*map(self._layer_token, lower), global_token) if whole else (),
            (*map(self._layer_patches, lower), patch_tokens) if patches else (),
        )
        return _no_images(output) if stand_in else output

    def token_grid(self, view_size: tuple[int, int]) -> TokenGrid:
        """Where the patch tokens lie in a view.

        For ViT (DeiT, DINOv2 and EVA too), Swin, ConvNeXt, PVT v2, ResNet, RegNet, EfficientNet
        and MobileNet it is worked out from the strides and paddings of the model's own layers,
        without a forward pass. Other models, and members of these families whose paths disagree
        (ResNet-D's averaging shortcuts, blurred strides), are measured once a view size and process
        (`measure_token_grid`), where they have few tokens on a view enlarged by 128 px: another
        instance or copy of the same architecture finds the grid measured. A line in the log says
        so (level INFO).

        Args:
            view_size: (height, width) in pixels.

        Returns:
            Static numbers; centres are continuous view pixels, as everywhere.

        Raises:
            ShapeError: a size that the model cannot take.

        Example:
            >>> tiny_vit(patch_size=8).token_grid((24, 48))
            TokenGrid(rows=3, cols=6, stride=(8.0, 8.0), offset=(4.0, 4.0))
        """
        if not isinstance(view_size, Sequence) or len(view_size) != 2:
            raise ShapeError(f"`view_size` must be (height, width), got {view_size!r}")
        height, width = (check_at_least("view_size", side, 1) for side in view_size)
        self._check_size("view_size", height, width)
        if self._steps is not None:
            return grid_of_steps(self._steps, (height, width))
        if (height, width) not in self._grids:
            key = (*_architecture(self.model), height, width)
            if key not in _measured_grids:
                start = time.perf_counter()
                grid = self._measure((height, width))
                _logger.info(
                    "no formula for %s: measured the token grid of a %d × %d view from input "
                    "gradients in %.1f s: %s",
                    type(self.model).__name__,
                    height,
                    width,
                    time.perf_counter() - start,
                    grid,
                )
                _measured_grids[key] = grid
            self._grids[height, width] = _measured_grids[key]
        return self._grids[height, width]

    def _measure(self, view_size: tuple[int, int]) -> TokenGrid:
        still = copy.deepcopy(self).float().eval()  # leaves statistics and modes alone
        shape = still._shape(view_size)
        few = [count < _FEW_TOKENS for count in shape]
        if any(few):
            height, width = (
                side + _MORE_PIXELS * add for side, add in zip(view_size, few, strict=True)
            )
            try:
                larger_shape = still._shape((height, width))
            except (RuntimeError, AssertionError, ValueError) as error:
                _logger.info(
                    "%s takes no larger view, its grid is measured from few tokens: %s",
                    type(self.model).__name__,
                    error,
                )
            else:
                larger = measure_token_grid(
                    still, (height, width), shape=larger_shape, in_chans=self._in_chans
                )
                return larger._replace(rows=shape[0], cols=shape[1])
        return measure_token_grid(still, view_size, shape=shape, in_chans=self._in_chans)

    @torch.no_grad()
    def _shape(self, view_size: tuple[int, int]) -> tuple[int, int]:
        model: Any = self.model
        like = next(self.parameters(), torch.zeros(()))
        images = torch.zeros(1, self._in_chans, *view_size, device=like.device)
        features = model.forward_features(self._without_remainder(images))
        count = self._patch_tokens(features).shape[1]
        if features.dim() == 3:
            return squarest_shape(count, view_size)
        first = 1 if self._channels_last else 2
        return int(features.shape[first]), int(features.shape[first + 1])

    def _without_remainder(self, images: Tensor) -> Tensor:
        # A remainder would be refused by timm; leaving it out is what the grid says.
        height, width = images.shape[-2:]
        rest_y, rest_x = height % self._multiple[0], width % self._multiple[1]
        if rest_y or rest_x:
            images = images[..., : height - rest_y, : width - rest_x]
        return images

    def extra_repr(self) -> str:
        """Sizes for ``print``."""
        return f"embed_dim={self.embed_dim}, layer_dims={self.layer_dims}"

    def _is_sequence_model(self) -> bool:
        return hasattr(self.model, "blocks") and hasattr(self.model, "num_prefix_tokens")

    def _check_size(self, argument: str, height: int, width: int) -> None:
        if self._fixed_size is not None and (height, width) != self._fixed_size:
            raise ShapeError(
                f"`{argument}`: the view is {height} × {width}, but the model was built for "
                f"{self._fixed_size[0]} × {self._fixed_size[1]} alone; build it with "
                "dynamic_img_size=True (ViT) or strict_img_size=False (Swin)"
            )
        if height < self._least[0] or width < self._least[1]:
            raise ShapeError(
                f"`{argument}`: the view is {height} × {width}, too small for one token; the model "
                f"needs at least {self._least[0]} × {self._least[1]}"
            )

    def _patch_tokens(self, features: Any) -> Tensor:
        if not isinstance(features, Tensor) or features.dim() not in (3, 4):
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ShapeError(
                f"`{type(self.model).__name__}.forward_features` must give a map of 4 axes or "
                f"tokens of 3, got {got}: this model has no patch tokens that can be matched"
            )
        if features.dim() == 3:
            return self._pooled_norm(features[:, self._prefix :])
        if self._channels_last:
            return features.flatten(1, 2)
        return self._map_norm(features).flatten(2).transpose(1, 2)

    def _pooled_norm(self, tokens: Tensor) -> Tensor:
        # average-pooled ViTs have their final norm behind the pooling; in others this is Identity
        norm: nn.Module | None = getattr(self.model, "fc_norm", None)
        normed: Tensor = tokens if norm is None else norm(tokens)
        return normed

    def _map_norm(self, features: Tensor) -> Tensor:
        model: Any = self.model
        normed: Tensor = model.head.norm(features) if self._norm_in_head else features
        return normed

    def _global_token(self, features: Tensor, patch_tokens: Tensor) -> Tensor:
        if self._class_token:
            return self._pooled_norm(features[:, 0])
        model: Any = self.model
        pooled: Tensor = model.forward_head(features, pre_logits=True)
        # A model without pooling, or whose head widens the features, has no such (b, d) vector.
        usable = pooled.dim() == 2 and pooled.shape[1] == self.embed_dim
        return pooled if usable else patch_tokens.mean(1)

    def _layer_patches(self, features: Any) -> Tensor:
        if isinstance(features, Tensor) and features.dim() == 4:
            return features.flatten(2).transpose(1, 2)
        spatial: Tensor = features[0] if isinstance(features, tuple) else features
        model: Any = self.model
        return self._pooled_norm(model.norm(spatial))

    def _layer_token(self, features: Any) -> Tensor:
        if isinstance(features, Tensor) and features.dim() == 4:
            return features.mean((2, 3))  # timm gives stages as (b, d, rows, cols) in every family
        spatial, prefix = features if isinstance(features, tuple) else (features, None)
        model: Any = self.model
        if self._class_token and prefix is not None:
            return self._pooled_norm(model.norm(prefix[:, 0]))
        return self._pooled_norm(model.norm(spatial).mean(1))


def tiny_vit(
    img_size: int = 48,
    patch_size: int = 8,
    width: int = 96,
    depth: int = 3,
    num_heads: int = 3,
    *,
    mlp_ratio: float = 4.0,
    drop_path_rate: float = 0.0,
    layers: bool = False,
    patch_layers: bool = False,
) -> TimmBackbone:
    """The demo's vision transformer, small enough to be trained on two CPU cores.

    Args:
        img_size: side of the views that the position embedding is made for, in pixels; other views
            are taken as well, it is resampled for them.
        patch_size: side of a patch in pixels.
        width: dimension of the tokens.
        depth: number of blocks.
        num_heads: attention heads, a divisor of ``width``.
        mlp_ratio: hidden dimension of a block's MLP over ``width``.
        drop_path_rate: stochastic depth of the last block.
        layers: also give every block's global token.
        patch_layers: also give every block's patch tokens.

    Returns:
        `TimmBackbone` around ``timm.models.vision_transformer.VisionTransformer``.

    Raises:
        MissingExtraError: timm is not installed.
        ConfigError: sizes that cannot be.

    Example:
        >>> import torch
        >>> backbone = tiny_vit(layers=True)
        >>> out = backbone(torch.zeros(2, 3, 24, 24))
        >>> out.patch_tokens.shape, len(out.layers)
        (torch.Size([2, 9, 96]), 3)
    """
    for argument, value in (("patch_size", patch_size), ("width", width), ("depth", depth)):
        check_at_least(argument, value, 1)
    check_at_least("img_size", img_size, patch_size)
    check_at_least("num_heads", num_heads, 1)
    if width % num_heads:
        raise ConfigError(
            f"`width` must be a multiple of `num_heads`, got width={width}, num_heads={num_heads}"
        )
    timm_vit = require_extra("timm.models.vision_transformer", "train")
    model: nn.Module = timm_vit.VisionTransformer(
        img_size=img_size,
        patch_size=patch_size,
        embed_dim=width,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
        drop_path_rate=drop_path_rate,
        num_classes=0,
        dynamic_img_size=True,
        # Xavier's rule: timm's default, a standard deviation of 0.02 whatever the width, is made
        # for widths of 384 and more, and leaves a narrow model's blocks next to idle at first.
        weight_init="moco",
    )
    return TimmBackbone(model, layers=layers, patch_layers=patch_layers)


def _create(name: str, pretrained: bool, timm_kwargs: dict[str, Any]) -> nn.Module:
    timm = require_extra("timm", "train")
    if not isinstance(name, str):
        raise ConfigError(f"`name` must be a timm model name or an nn.Module, got {name!r}")
    options: dict[str, Any] = {"num_classes": 0}
    if ":" not in name:  # "hf-hub:…" and the like are timm's to resolve
        base = name.partition(".")[0]
        if not timm.is_model(base):
            close = difflib.get_close_matches(base, timm.list_models(), n=5, cutoff=0.5)
            hint = f"; close to it: {', '.join(close)}" if close else ""
            raise ConfigError(
                f"`name`: timm knows no model {name!r}{hint} (see timm.list_models())"
            )
        family = timm.model_entrypoint(base).__module__.rpartition(".")[2]
        options.update(_ANY_SIZE.get(family, {}))
    options.update(timm_kwargs)
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
    except TypeError as error:
        raise ConfigError(
            f"`timm_kwargs`: timm's {name!r} refuses one of {sorted(options)}: {error}"
        ) from error
    except RuntimeError as error:
        if "tag" not in str(error):
            raise
        raise ConfigError(f"`name`: timm has no such weights for {name!r}: {error}") from error
    return model


def _in_chans(model: Any) -> int:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels  # the first convolution is the one that sees the image
    return int(getattr(model, "in_chans", 3))


def _architecture(model: nn.Module) -> tuple[str, frozenset[type]]:
    """What a measured grid depends on: classes, settings and shapes, not weights."""
    told: list[str] = []
    for name, module in model.named_modules():
        settings = sorted(
            f"{key}={value!r}" for key, value in vars(module).items() if _is_setting(key, value)
        )
        parts = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        shapes = [f"{part_name}{tuple(part.shape)}" for part_name, part in parts]
        told.append(f"{name}:{type(module).__qualname__}:{settings}:{shapes}")
    digest = hashlib.sha256("\n".join(told).encode()).hexdigest()
    return digest, frozenset(type(module) for module in model.modules())


def _is_setting(key: str, value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_setting(key, entry) for entry in value)
    return key != "training" and isinstance(value, (int, float, str, type(None)))


def _size_limits(model: Any) -> tuple[tuple[int, int], tuple[int, int] | None]:
    """The multiple that views are cropped to, and the one size that a strict model takes."""
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None)
    if embed is None or size is None or not hasattr(embed, "strict_img_size"):
        return (1, 1), None
    if embed.strict_img_size:
        return (1, 1), (int(size[0]), int(size[1]))
    if getattr(embed, "dynamic_img_pad", False):
        return (1, 1), None
    return (int(embed.patch_size[0]), int(embed.patch_size[1])), None


def _least_size(model: Any, steps: Any) -> tuple[int, int]:
    if steps is None:
        return 1, 1
    pvt = require_extra("timm.models.pvt_v2", "train")
    # (steps before it, side) of windows beside the main path: PVT v2 attends to coarser tokens.
    windows = [(len(steps), 1)]
    if isinstance(model, pvt.PyramidVisionTransformerV2):
        for stage_index, stage in enumerate(model.stages):
            coarser = (getattr(block.attn, "sr", None) for block in stage.blocks)
            windows += [(stage_index + 1, sr.kernel_size[0]) for sr in coarser if sr is not None]
    least = 1
    while any(
        min(grid_of_steps(steps[:done], (least, least))[:2]) < side for done, side in windows
    ):
        least += 1
    return least, least


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def _no_images(output: BackboneOutput) -> BackboneOutput:
    """None of the images, but still in the graph: every parameter gets a gradient, of 0."""
    return BackboneOutput(
        output.global_token[:0],
        output.patch_tokens[:0],
        tuple(layer[:0] for layer in output.layers),
        tuple(layer[:0] for layer in output.patch_layers),
    )


def _layer_dims(model: Any) -> tuple[int, ...]:
    if not hasattr(model, "forward_intermediates"):
        raise ConfigError(
            f"`layers`: {type(model).__name__} cannot give its intermediate features; use "
            "layers=False or another model"
        )
    resnet = require_extra("timm.models.resnet", "train")
    dims = tuple(int(info["num_chs"]) for info in model.feature_info)
    if isinstance(model, resnet.ResNet):
        dims = dims[1:]  # it lists its stem as well, which is no stage
    return (*dims[:-1], int(model.num_features))  # EfficientNet widens the last one after its stage
