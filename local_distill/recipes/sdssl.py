"""SDSSL on MoCo v3, BYOL and SimCLR, assembled from the parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from local_distill._check import check_sequence
from local_distill._precision import no_autocast
from local_distill.errors import ConfigError, ShapeError
from local_distill.layer_heads import LayerHeads, LayerOutputs
from local_distill.losses.intermediate import IntermediateDistillationLoss, IntermediateTerms
from local_distill.losses.view_objectives import ByolObjective, MocoV3Objective, SimclrObjective
from local_distill.teacher import EmaTeacher

__all__ = ["Sdssl", "sdssl_byol", "sdssl_moco", "sdssl_simclr"]

Layers = Tensor | Sequence[Tensor]


class Sdssl(nn.Module):
    """A step of SDSSL: heads of every layer, the teacher's head, and the loss between them.

    Made by `sdssl_moco`, `sdssl_byol` and `sdssl_simclr`.

    Convention: what comes in are the backbones' features, one vector a view and layer; the heads
    are in here. Pass ``student_heads.parameters()`` to the optimiser, and call `update_teacher`
    after its step. MoCo v3's and BYOL's views go through the heads one by one, SimCLR's as one
    batch, so that BatchNorm takes its statistics over both. On several processes convert with
    ``nn.SyncBatchNorm.convert_sync_batchnorm``.

    Args:
        student_heads: projectors and predictors of all layers.
        loss: the loss, of the same depth.
        mean_at_zero: see ``legacy`` of `sdssl_byol`.

    Attributes:
        student_heads: `LayerHeads`.
        teacher_head: `EmaTeacher` of the last projector; None for SimCLR.
        loss: `IntermediateDistillationLoss`.
    """

    def __init__(
        self,
        student_heads: LayerHeads,
        loss: IntermediateDistillationLoss,
        *,
        mean_at_zero: bool = False,
    ) -> None:
        super().__init__()
        if student_heads.depth != loss.depth:
            raise ConfigError(
                f"`loss` was made for depth={loss.depth} but `student_heads` for "
                f"depth={student_heads.depth}"
            )
        self.student_heads = student_heads
        alone = student_heads.method == "simclr"
        self.teacher_head = None if alone else EmaTeacher(student_heads.projectors[-1])
        self.loss = loss
        self.mean_at_zero = bool(mean_at_zero)

    def forward(
        self,
        student_layers: Sequence[Layers],
        teacher_last: Sequence[Tensor] | None = None,
        *,
        ratio: float,
    ) -> IntermediateTerms:
        """The loss of a step.

        Args:
            student_layers: per view its layers' features, the last layer last: (depth, b, d), or a
                list of (b, d_l).
            teacher_last: per view (b, d), the features of the teacher's last layer; None for
                SimCLR.
            ratio: weight of the lower layers in this step.

        Returns:
            `IntermediateTerms`: loss, last, intermediate, detached.

        Raises:
            ShapeError: axes that do not fit, no ``teacher_last`` where there is a teacher, or one
                where there is none.
        """
        check_sequence("student_layers", student_layers, "a view's layers")
        if (teacher_last is None) != (self.teacher_head is None):
            raise ShapeError(
                "`teacher_last` is needed by MoCo v3 and BYOL, and must be None for SimCLR, which "
                "has no teacher"
            )
        if self.teacher_head is None:
            outputs = self._together(student_layers)
            targets = [out.projections[-1] for out in outputs]
            terms: IntermediateTerms = self.loss(
                [out.predictions for out in outputs], targets, ratio=ratio
            )
            return terms
        assert teacher_last is not None
        check_sequence("teacher_last", teacher_last, "a tensor")
        outputs = [self.student_heads(layers) for layers in student_layers]
        targets = [self.teacher_head(features) for features in teacher_last]
        parts = [out.detached for out in outputs]
        detached = None if any(part is None for part in parts) else parts
        terms = self.loss(
            [out.predictions for out in outputs], targets, ratio=ratio, detached_layers=detached
        )
        if self.mean_at_zero and ratio == 0:
            depth = self.loss.depth
            mean = (terms.last + (depth - 1) * terms.intermediate) / depth
            loss = mean + self.loss.detached_weight * terms.detached
            return IntermediateTerms(loss, terms.last, terms.intermediate, terms.detached)
        return terms

    def update_teacher(self, momentum: float) -> None:
        """Move the teacher's head towards the student's last projector; SimCLR has none to move.

        Args:
            momentum: as in `EmaTeacher.update`; published: 0.996, rising to 1 as a cosine.
        """
        if self.teacher_head is not None:
            self.teacher_head.update(self.student_heads.projectors[-1], momentum)

    def _together(self, student_layers: Sequence[Layers]) -> list[LayerOutputs]:
        """All views through the heads as one batch."""
        depth = self.loss.depth
        for v, layers in enumerate(student_layers):
            if len(layers) != depth:
                raise ShapeError(
                    f"`student_layers[{v}]` has {len(layers)} layers but this recipe was made for "
                    f"depth={depth}"
                )
        # Autocast to one half precision refuses to put tensors of the other one together.
        with no_autocast(student_layers[0][0]):
            together = [torch.cat(views) for views in zip(*student_layers, strict=True)]
        out = self.student_heads(together)
        sizes = [layers[-1].shape[0] for layers in student_layers]
        views = out.projections.split(sizes, 1)
        return [LayerOutputs(view, view, None) for view in views]


def sdssl_moco(
    depth: int = 12,
    *,
    embed_dim: int | Sequence[int] = 768,
    hidden_dim: int = 2048,
    last_hidden_dim: int = 4096,
    out_dim: int = 256,
    temp: float = 0.2,
    process_group: dist.ProcessGroup | None = None,
) -> Sdssl:
    """SDSSL on MoCo v3: every layer finds its image by the momentum teacher's last layer.

    .. math:: L = M(s^{last}, t) + ratio·mean_{l<last} M(s^l, t) + depth·mean_l M(p^l, t)

    with M `MocoV3Objective`; see `IntermediateDistillationLoss` for the rest.

    Convention: ratio comes from the caller: ``cosine(step, start=0.0, end=1.0, total=steps)``.

    Args:
        depth: the number of layers, the last included; published: 12, the blocks of a ViT.
        embed_dim: d of every layer's features, or one number a layer.
        hidden_dim: width of the lower layers' projectors.
        last_hidden_dim: width of the last projector and of all predictors.
        out_dim: o.
        temp: τ.
        process_group: the processes over which gradients are averaged; None: all.

    Returns:
        `Sdssl`.

    Raises:
        ConfigError: a size below 1, a temperature not above 0.

    Example:
        >>> recipe = sdssl_moco(3, embed_dim=8, hidden_dim=16, last_hidden_dim=16, out_dim=4)
        >>> student = [torch.randn(3, 6, 8) for _ in range(2)]  # two views: layers, images, d
        >>> teacher = [torch.randn(6, 8) for _ in range(2)]  # its last layer
        >>> recipe(student, teacher, ratio=0.5).loss.shape
        torch.Size([])
        >>> recipe.update_teacher(momentum=0.996)

    Source: "Self-Distilled Self-Supervised Representation Learning" (SDSSL, WACV 2023); "An
    Empirical Study of Training Self-Supervised Vision Transformers" (MoCo v3, ICCV 2021).
    Published: τ = 0.2, ratio 0 → 1, teacher momentum 0.996 → 1, two views.

    Deviations from the authors' code: none in loss and gradient for 12 layers and two views. Better
    here: any depth and any number of views; layers of different widths (Swin, ConvNeXt, ResNet);
    processes with different numbers of images count each image alike; all layers go through the
    same keys in one pass. The teacher's running statistics, which training does not read, are the
    student's and not its own.
    """
    heads = LayerHeads(
        embed_dim,
        depth,
        method="moco",
        hidden_dim=hidden_dim,
        last_hidden_dim=last_hidden_dim,
        out_dim=out_dim,
    )
    objective = MocoV3Objective(temp, process_group=process_group)
    return Sdssl(heads, IntermediateDistillationLoss(objective, depth=depth))


def sdssl_byol(
    depth: int = 12,
    *,
    embed_dim: int | Sequence[int] = 768,
    hidden_dim: int = 2048,
    last_hidden_dim: int = 4096,
    out_dim: int = 256,
    legacy: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> Sdssl:
    """SDSSL on BYOL: every layer predicts the momentum teacher's last layer.

    .. math:: L = B(s^{last}, t) + ratio·mean_{l<last} B(s^l, t) + depth·mean_l B(p^l, t)

    with B `ByolObjective`; see `IntermediateDistillationLoss` for the rest.

    Convention: ratio comes from the caller: ``cosine(step, start=0.0, end=0.8, total=steps)``. The
    heads end without a BatchNorm.

    Args:
        depth: the number of layers, the last included; published: 12.
        embed_dim: d of every layer's features, or one number a layer.
        hidden_dim: width of the lower layers' projectors.
        last_hidden_dim: width of the last projector and of all predictors.
        out_dim: o.
        legacy: where ratio is 0 take the mean over *all* layers for the last layer's term, as the
            authors' code does.
        process_group: the processes over which gradients are averaged; None: all.

    Returns:
        `Sdssl`.

    Raises:
        ConfigError: a size below 1.

    Example:
        >>> recipe = sdssl_byol(3, embed_dim=8, hidden_dim=16, last_hidden_dim=16, out_dim=4)
        >>> student = [torch.randn(3, 6, 8) for _ in range(2)]
        >>> teacher = [torch.randn(6, 8) for _ in range(2)]
        >>> recipe(student, teacher, ratio=0.5).loss.shape
        torch.Size([])

    Source: "Self-Distilled Self-Supervised Representation Learning" (SDSSL, WACV 2023); "Bootstrap
    Your Own Latent" (NeurIPS 2020). Published: ratio 0 → 0.8, teacher momentum 0.996 → 1, two
    views.

    Deviations from the authors' code: at ratio 0, which is its first step, theirs averages the loss
    over all layers, so that the lower layers, which should not learn yet, learn eleven times as
    much as the last one; here they learn nothing, and ``legacy=True`` gives theirs. Better here:
    as in `sdssl_moco`.
    """
    heads = LayerHeads(
        embed_dim,
        depth,
        method="byol",
        hidden_dim=hidden_dim,
        last_hidden_dim=last_hidden_dim,
        out_dim=out_dim,
    )
    objective = ByolObjective(process_group=process_group)
    loss = IntermediateDistillationLoss(objective, depth=depth)
    return Sdssl(heads, loss, mean_at_zero=legacy)


def sdssl_simclr(
    depth: int = 12,
    *,
    embed_dim: int | Sequence[int] = 768,
    hidden_dim: int = 2048,
    last_hidden_dim: int = 4096,
    out_dim: int = 256,
    temp: float = 0.2,
    legacy: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> Sdssl:
    """SDSSL on SimCLR: every layer finds its image by the last layer itself, without a teacher.

    .. math:: L = C(s^{last}, s^{last}) + ratio·mean_{l<last} C(s^l, sg s^{last})

    with C `SimclrObjective`; see `IntermediateDistillationLoss` for the rest.

    Convention: ratio comes from the caller: ``cosine(step, start=0.0, end=0.8, total=steps)``. All
    views go through the projectors as one batch; there are no predictors, so ``detached`` is 0.

    Args:
        depth: the number of layers, the last included; published: 12.
        embed_dim: d of every layer's features, or one number a layer.
        hidden_dim: width of the lower layers' projectors.
        last_hidden_dim: width of the last projector.
        out_dim: o.
        temp: τ.
        legacy: lose the gradient of other processes, as the authors' gather does.
        process_group: the processes over which gradients are averaged; None: all.

    Returns:
        `Sdssl`.

    Raises:
        ConfigError: a size below 1, a temperature not above 0.

    Example:
        >>> recipe = sdssl_simclr(3, embed_dim=8, hidden_dim=16, last_hidden_dim=16, out_dim=4)
        >>> student = [torch.randn(3, 6, 8) for _ in range(2)]
        >>> recipe(student, ratio=0.5).loss.shape
        torch.Size([])

    Source: "Self-Distilled Self-Supervised Representation Learning" (SDSSL, WACV 2023); "A Simple
    Framework for Contrastive Learning of Visual Representations" (SimCLR, ICML 2020). Published:
    ratio 0 → 0.8, two views; τ = 0.2 is written into the code, its setting ``temperature`` is never
    read.

    Deviations from the authors' code: on several processes theirs hands each process only the
    gradient of its own loss; here the gradients are summed, and ``legacy=True`` gives theirs.
    Better here: as in `sdssl_moco`.
    """
    heads = LayerHeads(
        embed_dim,
        depth,
        method="simclr",
        hidden_dim=hidden_dim,
        last_hidden_dim=last_hidden_dim,
        out_dim=out_dim,
    )
    objective = SimclrObjective(temp, legacy=legacy, process_group=process_group)
    return Sdssl(heads, IntermediateDistillationLoss(objective, depth=depth))
