"""CrIBo: clusters of two views agree, and with like clusters of other images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from local_distill._check import Axes, check_positive, check_sequence, check_weight
from local_distill._logits import multiplied_out
from local_distill.errors import ConfigError, ShapeError
from local_distill.losses._pairs import Processes, paired_cross_entropy
from local_distill.losses.global_distillation import GlobalDistillationLoss
from local_distill.losses.local_distillation import LocalDistillationLoss
from local_distill.matching._joint_tokens import CostScale
from local_distill.matching.clusters import Clusters
from local_distill.matching.cross_image import CrossImageQueue
from local_distill.matching.refined_clusters import RefinedJointClusters
from local_distill.structures import Matches, Tokens, ViewOutput
from local_distill.targets.centering import Centering

__all__ = ["Cribo", "CriboTerms", "cribo"]

Head = Callable[[Tensor], Tensor]


class CriboTerms(NamedTuple):
    """What a step's loss is made of.

    Attributes:
        loss: the sum; call ``backward`` on it.
        global_loss: of whole views, with its graph.
        cluster_loss: of clusters of the same image, with its graph.
        neighbour_loss: of clusters of other images, unweighted, with its graph.
        valid: (b, k) bool, the clusters that both views have.
        neighbours: (b, k) bool, those of view 0 that found a neighbour in the queue.
    """

    loss: Tensor
    global_loss: Tensor
    cluster_loss: Tensor
    neighbour_loss: Tensor
    valid: Tensor
    neighbours: Tensor


class Cribo(nn.Module):
    """A step of CrIBo: clusters, the queue of objects, three losses. Made by `cribo`.

    Args:
        global_loss: with its targets.
        cluster_loss: with targets of its own, which the neighbours share.
        clusters: what clusters both views' tokens together.
        queue: objects of earlier images; filled by `forward` when training with grad enabled.
        legacy: see `cribo`.
    """

    def __init__(
        self,
        global_loss: GlobalDistillationLoss,
        cluster_loss: LocalDistillationLoss,
        clusters: RefinedJointClusters,
        queue: CrossImageQueue,
        *,
        legacy: bool = False,
    ) -> None:
        super().__init__()
        if queue.num_objects != clusters.num_clusters:
            raise ConfigError(
                f"`queue` was made for num_objects={queue.num_objects} but `clusters` for "
                f"num_clusters={clusters.num_clusters}"
            )
        self.global_loss = global_loss
        self.cluster_loss = cluster_loss
        self.clusters = clusters
        self.queue = queue
        self.legacy = bool(legacy)

    def forward(
        self,
        student: Sequence[ViewOutput],
        teacher: Sequence[ViewOutput],
        *,
        student_head: Head,
        teacher_head: Head,
        teacher_temp: float,
        cluster_teacher_temp: float | None = None,
        neighbour_weight: float = 1.0,
        image_id: Tensor | None = None,
        initial: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> CriboTerms:
        """The loss of a step.

        Args:
            student: two `ViewOutput` with ``global_logits`` (b, c) and ``tokens``, whose features
                (b, n, d) are the last layer's patches.
            teacher: the same two views, the teacher's; with geometry and grid.
            student_head: from pooled features (b, k, d) to prototype scores (b, k, c').
            teacher_head: likewise, the teacher's.
            teacher_temp: τ_t of whole views, above 0.
            cluster_teacher_temp: τ_t of clusters; None: the same.
            neighbour_weight: weight of the neighbours' loss, at least 0; published: 0 in the first
                epoch, then 1.
            image_id: (b,) int64 ≥ 0 which images these are, so that none is its own neighbour.
            initial: (b, k) tokens to start from, see `RefinedJointClusters`; drawn if None.
            generator: for the draw.

        Returns:
            `CriboTerms`.

        Raises:
            ShapeError: not two views, a part that is missing, axes that differ.
            ConfigError: a temperature not above 0, a weight below 0.
            GeometryError: as `nearest_matches`.
        """
        check_weight("neighbour_weight", neighbour_weight)
        logits, tokens = _parts("student", student)
        teacher_logits, teacher_tokens = _parts("teacher", teacher)
        whole = self.global_loss(logits, teacher_logits, teacher_temp=teacher_temp)
        found = self.clusters(
            teacher_tokens[0], teacher_tokens[1], initial=initial, generator=generator
        )
        valid = found[0].valid
        answers = [student_head(view) for view in _pooled("student", tokens, found)]
        temp = teacher_temp if cluster_teacher_temp is None else cluster_teacher_temp
        with torch.no_grad():
            objects = _pooled("teacher", teacher_tokens, found)
            targets = [teacher_head(view) for view in objects]
            one, two = Tokens(objects[0]), Tokens(objects[1])
            ways = (
                self.queue(one, two, image_id=image_id),
                self.queue(two, one, view=1, image_id=image_id),
            )
        # Before the clusters' loss, which moves the center that both are taken around.
        near = self._neighbours(answers, ways, teacher_head, temp)
        same = Matches.identity(valid)
        local = self.cluster_loss(
            answers,
            targets,
            {(0, 1): same, (1, 0): same},
            teacher_temp=temp,
            teacher_valid=[valid, valid],
        )
        if self.training and torch.is_grad_enabled():
            self.queue.update(one, two, valid=valid, image_id=image_id)
        loss = whole + local + neighbour_weight * near
        return CriboTerms(loss, whole, local, near, valid, ways[0].matched)

    def extra_repr(self) -> str:
        """The settings, for print."""
        return f"legacy={self.legacy}"

    def _neighbours(
        self,
        answers: Sequence[Tensor],
        ways: tuple[Matches, Matches],
        teacher_head: Head,
        teacher_temp: float,
    ) -> Tensor:
        """Each view's objects against what the other view's found in the queue."""
        b = answers[0].shape[0]
        with torch.no_grad():
            rows = (self.queue.rows(0), self.queue.rows(1))
            # As seen by the view that looked for them; the head only on what was found.
            logits = [
                teacher_head(way.gather(row.expand(b, -1, -1)))
                for way, row in zip(ways, rows, strict=True)
            ]
        targets = dict(enumerate(self.cluster_loss.targets(logits, teacher_temp=teacher_temp)))
        processes = Processes(
            self.training and torch.is_grad_enabled(), self.cluster_loss.process_group
        )
        kept = [Matches.identity(way.matched) for way in ways]
        pairs = {(1, 0): kept[0], (0, 1): kept[1]}
        if not self.legacy:
            return paired_cross_entropy(
                answers,
                targets,
                pairs,
                student_temp=self.cluster_loss.student_temp,
                normalize="matched",
                processes=processes,
            )
        first, second = (
            paired_cross_entropy(
                answers,
                targets,
                {pair: matches},
                student_temp=self.cluster_loss.student_temp,
                normalize="matched",
                processes=processes,
            )
            for pair, matches in pairs.items()
        )
        counts = processes.sum(torch.stack([way.matched.sum() for way in ways]).to(first.dtype))
        ratio = torch.where(counts[0] > 0, counts[1] / counts[0].clamp_min(1), 0.0)
        return (first + ratio * second) / 2


def cribo(
    embed_dim: int = 384,
    num_prototypes: int = 65_536,
    cluster_prototypes: int = 65_536,
    *,
    num_clusters: int = 32,
    rounds: int = 5,
    epsilon: float = 0.05,
    sinkhorn_iterations: int = 5,
    position_weight: float = 1.0,
    update_masses: bool = True,
    cost_scale: CostScale = "batch",
    queue_images: int = 25_000,
    normalize_queue: bool = True,
    student_temp: float = 0.1,
    cluster_student_temp: float = 0.1,
    center_momentum: float = 0.9,
    legacy: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> Cribo:
    r"""CrIBo: objects of two views agree, and with the objects most like them in other images.

    .. math:: L = L_{DINO} + \tfrac12 Σ_{(v,q), v≠q} [H(c^q, c^v) + λ H(n^q, c^v)]

    with H the cross-entropy of the student's scores of c^v against the teacher's, meaned over the
    clusters that count. The teacher's last patches of both views are clustered together
    (`RefinedJointClusters`), c are the views' patches pooled by those clusters, and n^q is the row
    of a queue of earlier images' objects that is nearest to the teacher's c^q and leads back to it
    in the other view (`CrossImageQueue`).

    Convention: two views. The heads come from the caller: as published a DINO head of which the
    last layer is the clusters' own. They see a zero row for each cluster that is not valid. The
    queue is read before this step's objects enter it; they enter it when training with grad
    enabled. The neighbours' targets do not enter the center. λ comes from the caller, step by step.
    As published, the scale of the clusters' cost and the way back from the queue look at all of
    this process's batch; with ``cost_scale="image"`` and ``queue.cycle = "image"`` at one image, so
    that several processes do what one would.

    Args:
        embed_dim: d.
        num_prototypes: c.
        cluster_prototypes: c'.
        num_clusters: k. Published: 32 on ImageNet, 64 on COCO.
        rounds: see `RefinedJointClusters`, as the next five.
        epsilon: 1 / ``sinkhorn_lambda``.
        sinkhorn_iterations: steps of each side.
        position_weight: published: 1 on ImageNet, 2 on COCO.
        update_masses: ``update_c``.
        cost_scale: ``"batch"``, as published, or ``"image"``.
        queue_images: how many images the queue keeps.
        normalize_queue: ``normalized_matching``.
        student_temp: τ of whole views.
        cluster_student_temp: τ of clusters.
        center_momentum: of both centers.
        legacy: divide both directions of the neighbours' loss by the first one's number of
            neighbours, as the authors' code.
        process_group: the processes over which gradients are averaged; None: all.

    Returns:
        `Cribo`.

    Raises:
        ConfigError: a setting out of its range.

    Example:
        >>> from local_distill import TokenGrid, from_box
        >>> geometry = from_box(torch.tensor([[0.0, 0, 32, 32]] * 3), (32, 32), (32, 32))
        >>> tokens = Tokens(torch.randn(3, 16, 8), geometry, TokenGrid.tiling(4, 4, (32, 32)))
        >>> view = ViewOutput(global_logits=torch.randn(3, 10), tokens=tokens)
        >>> head = nn.Linear(8, 6)
        >>> step = cribo(8, 10, 6, num_clusters=4, queue_images=9)
        >>> terms = step([view, view], [view, view], student_head=head, teacher_head=head,
        ...              teacher_temp=0.04, neighbour_weight=0.0)
        >>> terms.loss.shape, step.queue.count
        (torch.Size([]), tensor(3))

    Source: "CrIBo: Self-Supervised Learning via Cross-Image Object-Level Bootstrapping" (ICLR 2024,
    arXiv 2310.07855). Published: the arguments' defaults; two views of 25 to 100 % of the image,
    teacher temperature 0.04 → 0.07 over 30 epochs, teacher momentum 0.996 → 1.

    Deviations from the authors' code: it divides the second direction of the neighbours' loss by
    the first one's number of neighbours, so that its weight depends on chance and a step without
    neighbours the first way loses those of the second; here each is divided by its own, and
    ``legacy=True`` gives theirs. Its queue starts with random rows that are matched like others;
    ours starts empty. Better here: with ``cost_scale="image"`` an image's clusters do not depend on
    the rest of its batch, the package's default in `RefinedJointClusters`; ``image_id`` keeps an
    image that comes again from being its own neighbour; positions are exact centres; Sinkhorn runs
    in the log domain, theirs in float32; nothing is read back from the device; processes whose
    numbers of clusters differ weigh by them.
    """
    return Cribo(
        GlobalDistillationLoss(
            Centering(num_prototypes, center_momentum, process_group=process_group),
            student_temp=student_temp,
            process_group=process_group,
        ),
        LocalDistillationLoss(
            Centering(cluster_prototypes, center_momentum, process_group=process_group),
            student_temp=check_positive("cluster_student_temp", cluster_student_temp),
            normalize="matched",
            process_group=process_group,
        ),
        RefinedJointClusters(
            num_clusters,
            rounds=rounds,
            epsilon=epsilon,
            sinkhorn_iterations=sinkhorn_iterations,
            position_weight=position_weight,
            update_masses=update_masses,
            cost_scale=cost_scale,
        ),
        CrossImageQueue(
            queue_images,
            num_objects=num_clusters,
            feature_dim=embed_dim,
            normalize=normalize_queue,
            cycle="batch",
            process_group=process_group,
        ),
        legacy=legacy,
    )


def _parts(name: str, views: Sequence[ViewOutput]) -> tuple[list[Tensor], list[Tokens]]:
    check_sequence(name, views, "a ViewOutput")
    if len(views) != 2:
        raise ShapeError(f"`{name}` must have two views, got {len(views)}")
    logits, tokens = [], []
    for v, view in enumerate(views):
        for part, value in (("global_logits", view.global_logits), ("tokens", view.tokens)):
            if value is None:
                raise ShapeError(f"`{name}[{v}]` has no `{part}`, which this recipe needs")
        assert view.global_logits is not None
        assert view.tokens is not None
        logits.append(multiplied_out(view.global_logits))
        tokens.append(view.tokens)
    return logits, tokens


def _pooled(name: str, tokens: Sequence[Tokens], found: Sequence[Clusters]) -> list[Tensor]:
    """Each view's clusters (b, k, d)."""
    axes = Axes()
    pooled = []
    for v, (view, part) in enumerate(zip(tokens, found, strict=True)):
        if view.features is None:
            raise ShapeError(f"`{name}[{v}].tokens` has no `features`: give the last layer's")
        features = axes.bind(f"{name}[{v}].tokens.features", view.features, f"b n{v} d")
        pooled.append(part.pool(features))
    return pooled
