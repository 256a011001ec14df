"""SDSSL on MoCo v3, BYOL and SimCLR: every layer learns from the last one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from local_distill.backbones import TimmBackbone
from local_distill.errors import ConfigError
from local_distill.layer_heads import LayerHeads, LayerOutputs
from local_distill.recipes.sdssl import Sdssl, sdssl_byol, sdssl_moco, sdssl_simclr
from local_distill.training.loading import ViewBatch
from local_distill.training.methods.method import Method, Models, StepTerms
from local_distill.training.progress import Progress

__all__ = ["LayerNetwork", "SdsslByol", "SdsslMoco", "SdsslSimclr"]


class LayerNetwork(nn.Module):
    """A backbone with a head for every layer's global token.

    Args:
        backbone: made with ``layers=True``.
        heads: one projector, and one predictor where there are any, a layer.
    """

    def __init__(self, backbone: TimmBackbone, heads: LayerHeads) -> None:
        super().__init__()
        self.backbone, self.heads = backbone, heads

    def forward(
        self, views: Sequence[Tensor], *, teacher: bool = False
    ) -> list[LayerOutputs] | list[Tensor]:
        """Per view (b, 3, h, w) what the heads say, of a teacher the last projector alone."""
        layers = [self.backbone(view).layers for view in views]
        if teacher:
            return [self.heads.project_last(view[-1]) for view in layers]
        if self.heads.method != "simclr":
            return [self.heads(view) for view in layers]
        # As one batch, so that BatchNorm takes its statistics over all views, as published.
        out = self.heads([torch.cat(parts) for parts in zip(*layers, strict=True)])
        split = out.projections.split([len(view[-1]) for view in layers], 1)
        return [LayerOutputs(part, part, None) for part in split]


class _SdsslMethod(Method):
    wants_layers = True

    def __init__(
        self,
        hidden_dim: int = 2_048,
        last_hidden_dim: int = 4_096,
        out_dim: int = 256,
        ratio: float = 1.0,
    ) -> None:
        if ratio < 0:
            raise ConfigError(f"`method.ratio` must be at least 0, got {ratio!r}")
        self.hidden_dim, self.last_hidden_dim = hidden_dim, last_hidden_dim
        self.out_dim, self.ratio = out_dim, ratio

    def _recipe(self, backbone: TimmBackbone) -> Sdssl:
        raise NotImplementedError

    def _sizes(self, backbone: TimmBackbone) -> dict[str, Any]:
        """What all three recipes are told of the heads."""
        return {
            "depth": len(backbone.layer_dims),
            "embed_dim": backbone.layer_dims,
            "hidden_dim": self.hidden_dim,
            "last_hidden_dim": self.last_hidden_dim,
            "out_dim": self.out_dim,
        }

    def build(self, backbone: TimmBackbone, num_images: int) -> tuple[nn.Module, nn.Module]:
        """See `Method.build`."""
        recipe = self._recipe(backbone)
        return LayerNetwork(backbone, recipe.student_heads), recipe.loss

    def step(self, models: Models, batch: ViewBatch, now: Progress) -> StepTerms:
        """See `Method.step`."""
        outputs: list[LayerOutputs] = models.student(batch.views)
        if models.teacher is None:
            targets = [out.projections[-1] for out in outputs]
        else:
            targets = models.teacher(batch.views, teacher=True)
        detached = [out.detached for out in outputs]
        ratio = now.cosine(0.0, self.ratio)
        terms = models.criterion(
            [out.predictions for out in outputs],
            targets,
            ratio=ratio,
            detached_layers=None if models.teacher is None else detached,
        )
        values = {
            "last_loss": terms.last,
            "intermediate_loss": terms.intermediate,
            "ratio": ratio,
        }
        if models.teacher is not None:
            values["detached_loss"] = terms.detached
        return StepTerms(terms.loss, values, {}, (), [view.detach() for view in targets])


class SdsslMoco(_SdsslMethod):
    """SDSSL on MoCo v3, see `recipes.sdssl_moco`. All views are seen by student and teacher.

    Args:
        hidden_dim: width of the lower layers' projectors.
        last_hidden_dim: width of the last projector and of all predictors.
        out_dim: of the projections.
        ratio: weight of the lower layers at the end, reached along a cosine from 0; 0: the last
            layer alone teaches the backbone, as in MoCo v3. The predictors still learn from
            detached projections: of them the last one's gradient is twice MoCo v3's, which AdamW
            without clipping takes alike.
        temp: of the contrast.
    """

    def __init__(
        self,
        hidden_dim: int = 2_048,
        last_hidden_dim: int = 4_096,
        out_dim: int = 256,
        ratio: float = 1.0,
        temp: float = 0.2,
    ) -> None:
        super().__init__(hidden_dim, last_hidden_dim, out_dim, ratio)
        self.temp = temp

    def _recipe(self, backbone: TimmBackbone) -> Sdssl:
        return sdssl_moco(
            **self._sizes(backbone),
            temp=self.temp,
        )


class SdsslByol(_SdsslMethod):
    """SDSSL on BYOL, see `recipes.sdssl_byol`. All views are seen by student and teacher.

    Args:
        hidden_dim: width of the lower layers' projectors.
        last_hidden_dim: width of the last projector and of all predictors.
        out_dim: of the projections.
        ratio: weight of the lower layers at the end, reached along a cosine from 0.

    Deviations from the authors' code: at ratio 0, the first step, theirs takes the mean over all
    layers, see `recipes.sdssl_byol`. With a warm-up of the learning rate, which starts at 0, that
    step moves no weight.
    """

    def __init__(
        self,
        hidden_dim: int = 2_048,
        last_hidden_dim: int = 4_096,
        out_dim: int = 256,
        ratio: float = 0.8,
    ) -> None:
        super().__init__(hidden_dim, last_hidden_dim, out_dim, ratio)

    def _recipe(self, backbone: TimmBackbone) -> Sdssl:
        return sdssl_byol(
            **self._sizes(backbone),
        )


class SdsslSimclr(_SdsslMethod):
    """SDSSL on SimCLR, see `recipes.sdssl_simclr`; without a teacher.

    Args:
        hidden_dim: width of the lower layers' projectors.
        last_hidden_dim: width of the last projector.
        out_dim: of the projections.
        ratio: weight of the lower layers at the end, reached along a cosine from 0.
        temp: of the contrast.
    """

    has_teacher = False

    def __init__(
        self,
        hidden_dim: int = 2_048,
        last_hidden_dim: int = 4_096,
        out_dim: int = 256,
        ratio: float = 0.8,
        temp: float = 0.2,
    ) -> None:
        super().__init__(hidden_dim, last_hidden_dim, out_dim, ratio)
        self.temp = temp

    def _recipe(self, backbone: TimmBackbone) -> Sdssl:
        return sdssl_simclr(
            **self._sizes(backbone),
            temp=self.temp,
        )
