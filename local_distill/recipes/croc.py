"""CrOC: two views are clustered together, and their clusters agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from local_distill._check import Axes, check_positive, check_sequence
from local_distill._precision import at_least_float32
from local_distill.distributed import all_gather_with_gradient
from local_distill.errors import ShapeError
from local_distill.losses._pairs import Processes
from local_distill.losses._unit_rows import unit_rows
from local_distill.losses.global_distillation import GlobalDistillationLoss
from local_distill.losses.local_distillation import LocalDistillationLoss
from local_distill.matching._joint_tokens import CostScale
from local_distill.matching.clusters import Clusters
from local_distill.matching.joint_clusters import JointClusters
from local_distill.structures import CropGeometry, Matches, Tokens
from local_distill.targets.centering import Centering

__all__ = ["Croc", "CrocTerms", "CrocView", "croc"]

Head = Callable[[Tensor], Tensor]


class CrocView(NamedTuple):
    """What a ViT says of one view of b images, with n patches, d features and h attention heads.

    Attributes:
        global_logits: (b, c) prototype scores of the whole view.
        cls: (b, d) the last layer's [CLS] token.
        tokens: `Tokens` of the last layer's patches, features (b, n, d); on the teacher's side with
            geometry and grid.
        keys: (b, h, n, e) the patches' keys of the last attention; None on the student's side.
        cls_keys: (b, h, e) those of [CLS]; None on the student's side.
    """

    global_logits: Tensor
    cls: Tensor
    tokens: Tokens
    keys: Tensor | None = None
    cls_keys: Tensor | None = None


class CrocTerms(NamedTuple):
    """What a step's loss is made of.

    Attributes:
        loss: the weighted sum; call ``backward`` on it.
        global_loss: of whole views, unweighted, with its graph.
        cluster_loss: of pooled clusters, unweighted, with its graph.
        valid: (b, h·k) bool, the clusters that both views have, head by head.
    """

    loss: Tensor
    global_loss: Tensor
    cluster_loss: Tensor
    valid: Tensor


class Croc(nn.Module):
    """A step of CrOC: clustering, pooling and both losses. Made by `croc`, which says the rest.

    Args:
        global_loss: with its targets.
        cluster_loss: with targets of its own.
        clusters: what clusters both views' tokens together.
        cluster_weight: weight of the clusters' loss, above 0.

    Raises:
        ConfigError: a weight not above 0.
    """

    def __init__(
        self,
        global_loss: GlobalDistillationLoss,
        cluster_loss: LocalDistillationLoss,
        clusters: JointClusters,
        *,
        cluster_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.global_loss = global_loss
        self.cluster_loss = cluster_loss
        self.clusters = clusters
        self.cluster_weight = check_positive("cluster_weight", cluster_weight)

    def forward(
        self,
        student: Sequence[CrocView],
        teacher: Sequence[CrocView],
        *,
        student_head: Head,
        teacher_head: Head,
        teacher_temp: float,
        cluster_teacher_temp: float | None = None,
        initial: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> CrocTerms:
        """The loss of a step.

        Args:
            student: two `CrocView`, the student's.
            teacher: the same two views, the teacher's.
            student_head: from pooled features (b, h·k, d) to prototype scores (b, h·k, c').
            teacher_head: likewise, the teacher's.
            teacher_temp: τ_t of whole views, above 0.
            cluster_teacher_temp: τ_t of clusters; None: the same.
            initial: (b·h, start_clusters) tokens to start from, see `JointClusters`; drawn if None.
            generator: for the draw.

        Returns:
            `CrocTerms`.

        Raises:
            ShapeError: not two views, no keys on the teacher's side, axes that differ.
            ConfigError: a temperature not above 0.
            GeometryError: as `nearest_matches`.
        """
        for name, views in (("student", student), ("teacher", teacher)):
            check_sequence(name, views, "a CrocView")
            if len(views) != 2:
                raise ShapeError(f"`{name}` must have two views, got {len(views)}")
        whole = self.global_loss(
            [view.global_logits for view in student],
            [view.global_logits for view in teacher],
            teacher_temp=teacher_temp,
        )
        found = self._clusters(teacher, initial, generator)
        valid = found[0].valid
        learning = self.training and torch.is_grad_enabled()
        processes = Processes(learning, self.cluster_loss.process_group)
        pooled = _pooled("student", student, found, processes)
        student_logits = [student_head(view) for view in pooled]
        with torch.no_grad():
            pooled = _pooled("teacher", teacher, found, processes)
            teacher_logits = [teacher_head(view) for view in pooled]
        same = Matches.identity(valid)
        local = self.cluster_loss(
            student_logits,
            teacher_logits,
            {(0, 1): same, (1, 0): same},
            teacher_temp=teacher_temp if cluster_teacher_temp is None else cluster_teacher_temp,
            teacher_valid=[valid, valid],
        )
        return CrocTerms(whole + self.cluster_weight * local, whole, local, valid)

    def extra_repr(self) -> str:
        """The settings, for print."""
        return f"cluster_weight={self.cluster_weight}"

    @torch.no_grad()
    def _clusters(
        self,
        teacher: Sequence[CrocView],
        initial: Tensor | None,
        generator: torch.Generator | None,
    ) -> list[Clusters]:
        """Each view's clusters, those of all attention heads side by side: (b, n, h·k)."""
        axes = Axes()
        tokens, scores = [], []
        for v, view in enumerate(teacher):
            if view.keys is None or view.cls_keys is None:
                raise ShapeError(
                    f"`teacher[{v}]` needs `keys` and `cls_keys`, of which one is None"
                )
            keys = axes.bind(f"teacher[{v}].keys", view.keys, f"b h n{v} e")
            own = axes.bind(f"teacher[{v}].cls_keys", view.cls_keys, "b h e")
            heads = axes["h"]
            scores.append((unit_rows(keys) * unit_rows(own)[:, :, None]).sum(-1).flatten(0, 1))
            geometry = _repeated(view.tokens.geometry, heads)
            tokens.append(Tokens(keys.flatten(0, 1), geometry, view.tokens.grid))
        found = self.clusters(
            tokens[0],
            tokens[1],
            token_scores=(scores[0], scores[1]),
            initial=initial,
            generator=generator,
        )
        shape = (axes["b"], axes["h"])
        return [
            Clusters(
                part.assignment.unflatten(0, shape).transpose(1, 2).flatten(2),
                part.valid.unflatten(0, shape).flatten(1),
            )
            for part in found
        ]


def croc(
    num_prototypes: int = 65_536,
    cluster_prototypes: int = 8_192,
    *,
    start_clusters: int = 5,
    max_clusters: int = 4,
    epsilon: float = 0.05,
    sinkhorn_iterations: int = 5,
    position_weight: float = 4.0,
    token_temp: float = 2.0,
    cluster_temp: float = 2.0,
    cost_scale: CostScale = "batch",
    student_temp: float = 0.1,
    center_momentum: float = 0.9,
    cluster_weight: float = 1.0,
    process_group: dist.ProcessGroup | None = None,
) -> Croc:
    r"""CrOC: whole views agree as in DINO, and so do the clusters that two views have in common.

    .. math:: L = L_{DINO} + λ·mean_{(v,q), v≠q} mean_j [-P(h_t(c^q_j))·log softmax(h_s(c^v_j)/τ)]

    The teacher's keys of both views are clustered together, head by head (`JointClusters`); c_j are
    the last layer's patches pooled by those clusters, the student's and the teacher's alike,
    brought to the mean length of the [CLS] tokens, and sent through the heads h. Clusters that one
    view lacks do not count.

    Convention: two views. The heads come from the caller: as published a DINO head of which the
    last layer is the clusters' own. They see a zero row for each cluster that is not valid. Each
    side's [CLS] length is the mean over both views of all images, of all processes when training
    with grad enabled, and the student's has a gradient. With ``cost_scale="batch"`` the clusters
    are those of this process's batch alone.

    Args:
        num_prototypes: c.
        cluster_prototypes: c'.
        start_clusters: see `JointClusters`, as the next six.
        max_clusters: k.
        epsilon: 1 / ``sinkhorn_lambda``.
        sinkhorn_iterations: steps of each side.
        position_weight: ``pos_alpha``.
        token_temp: ``marginals_temp_r``.
        cluster_temp: ``marginals_temp_c``.
        cost_scale: ``"batch"``, as published, or ``"image"``.
        student_temp: τ, of views and clusters.
        center_momentum: of both centers.
        cluster_weight: λ, ``alpha_s``.
        process_group: the processes over which gradients are averaged; None: all.

    Returns:
        `Croc`.

    Raises:
        ConfigError: a setting out of its range.

    Example:
        >>> from local_distill import TokenGrid, from_box
        >>> geometry = from_box(torch.tensor([[0.0, 0, 32, 32]] * 3), (32, 32), (32, 32))
        >>> tokens = Tokens(torch.randn(3, 16, 8), geometry, TokenGrid.tiling(4, 4, (32, 32)))
        >>> view = CrocView(torch.randn(3, 10), torch.randn(3, 8), tokens,
        ...                 torch.randn(3, 2, 16, 4), torch.randn(3, 2, 4))
        >>> head = nn.Linear(8, 6)
        >>> terms = croc(10, 6)([view, view], [view, view], student_head=head, teacher_head=head,
        ...                     teacher_temp=0.04)
        >>> terms.loss.shape, terms.valid.shape  # 2 heads of 4 clusters
        (torch.Size([]), torch.Size([3, 8]))

    Source: "CrOC: Cross-View Online Clustering for Dense Visual Representation Learning" (CVPR
    2023, arXiv 2303.13245). Published: the arguments' defaults; two views of 25 to 100 % of the
    image, teacher temperature 0.04, teacher momentum 0.996 → 1, 300 epochs on COCO with ViT-S/16.

    Deviations from the authors' code: none in the value on one process. Better here: with
    ``cost_scale="image"`` an image's clusters do not depend on the rest of its batch, which is the
    package's default in `JointClusters`; positions are exact centres, not means of a map resized
    bicubically; two equal largest parts do not put a token in two clusters; no set of valid
    clusters is read back from the device; processes whose numbers of clusters differ weigh by
    them, where theirs weigh all processes alike, and each takes the [CLS] length of its own images.
    """
    return Croc(
        GlobalDistillationLoss(
            Centering(num_prototypes, center_momentum, process_group=process_group),
            student_temp=student_temp,
            process_group=process_group,
        ),
        LocalDistillationLoss(
            Centering(cluster_prototypes, center_momentum, process_group=process_group),
            student_temp=student_temp,
            normalize="matched",
            process_group=process_group,
        ),
        JointClusters(
            start_clusters,
            max_clusters,
            epsilon=epsilon,
            sinkhorn_iterations=sinkhorn_iterations,
            position_weight=position_weight,
            token_temp=token_temp,
            cluster_temp=cluster_temp,
            cost_scale=cost_scale,
        ),
        cluster_weight=cluster_weight,
    )


def _pooled(
    name: str, views: Sequence[CrocView], found: Sequence[Clusters], processes: Processes
) -> list[Tensor]:
    """Each view's clusters (b, h·k, d), of the mean length of the [CLS] tokens."""
    axes = Axes()
    tokens = []
    for v, view in enumerate(views):
        axes.bind(f"{name}[{v}].cls", view.cls, "b d")
        if view.tokens.features is None:
            raise ShapeError(f"`{name}[{v}].tokens` has no `features`: give the last layer's")
        features = axes.bind(f"{name}[{v}].tokens.features", view.tokens.features, f"b n{v} d")
        tokens.append(features)
    length = _mean(torch.cat([_lengths(view.cls) for view in views]), processes)
    return [
        length * unit_rows(part.pool(features))
        for part, features in zip(found, tokens, strict=True)
    ]


def _mean(values: Tensor, processes: Processes) -> Tensor:
    """The mean of all processes' values, through which the loss of each reaches those of all."""
    if processes.size == 1:
        return values.mean()
    totals = torch.stack((values.sum(), values.new_tensor(float(values.shape[0]))))
    whole = all_gather_with_gradient(totals[None], processes.group, counts=[1] * processes.size)
    total, count = whole.sum(0).unbind()
    return total / count.clamp_min(1.0)


def _lengths(rows: Tensor) -> Tensor:
    """(b,) the lengths of (b, d), whose squares may overflow."""
    wide = at_least_float32(rows)
    largest = wide.detach().abs().amax(-1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    lengths: Tensor = torch.linalg.vector_norm(wide / largest, dim=-1) * largest[:, 0]
    return lengths


def _repeated(geometry: CropGeometry | None, times: int) -> CropGeometry | None:
    """The geometry of each image for each of its attention heads."""
    if geometry is None:
        return None
    return CropGeometry(*(part.repeat_interleave(times, 0) for part in geometry))
