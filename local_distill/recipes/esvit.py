"""EsViT: whole views, and regions matched by the similarity of their features."""

from __future__ import annotations

import torch.distributed as dist

from local_distill.losses.global_distillation import GlobalDistillationLoss
from local_distill.losses.global_local import GlobalLocalDistillationLoss
from local_distill.losses.local_distillation import LocalDistillationLoss
from local_distill.matching.similarity import SimilarityMatcher
from local_distill.targets.centering import Centering

__all__ = ["esvit"]


def esvit(
    num_prototypes: int = 65_536,
    *,
    student_temp: float = 0.1,
    center_momentum: float = 0.9,
    process_group: dist.ProcessGroup | None = None,
) -> GlobalLocalDistillationLoss:
    """EsViT: DINO's loss, and the same for each region against the region most like it.

    .. math:: L = ½·L_view + ½·mean_{(v,q)} mean_{b,i} [-P_{j(i)}·log softmax(s_i / τ)]

    with j(i) the teacher's region whose features are most similar to those of the student's region
    i by the cosine.

    Convention: ``loss(student, teacher, teacher_temp=...)`` with `ViewOutput` of all three parts:
    ``tokens.features`` are the backbone's, before the head. Views and regions have centers of their
    own. Published settings that are not part of the loss: a head for views and one for regions,
    each `ProjectionHead` with 3 layers of 2,048, a bottleneck of 256 and 65,536 prototypes, whose
    norm is learnt; τ_t from 0.04 to 0.07 over 30 epochs; teacher momentum from 0.996 to 1 along a
    cosine; two views of 224 × 224 of 40 to 100 % of the image and eight of 96 × 96 of 5 to 40 %;
    300 epochs of AdamW with 512 images a step.

    Args:
        num_prototypes: c, of views and of regions.
        student_temp: τ, above 0.
        center_momentum: of the running means of the teacher's logits, in [0, 1).
        process_group: the processes over which gradients are averaged; None: all.

    Returns:
        `GlobalLocalDistillationLoss`, whose forward gives `DistillationTerms`.

    Raises:
        ConfigError: a setting out of range.

    Example:
        >>> import torch
        >>> from local_distill import Tokens, ViewOutput
        >>> loss = esvit(num_prototypes=8)
        >>> features = [torch.randn(2, n, 5) for n in (6, 6, 2)]
        >>> views = [ViewOutput(torch.zeros(2, 8), torch.zeros(2, f.shape[1], 8), Tokens(f))
        ...          for f in features]
        >>> loss(views, views[:2], teacher_temp=0.04).loss  # a flat student: ln 8
        tensor(2.0794)

    Source: "Efficient Self-supervised Vision Transformers for Representation Learning" (EsViT, ICLR
    2022), equations 1 and 2. The paper adds the two terms; its code, as here, halves that sum.

    Deviations from the authors' code: none in loss, gradient and centers. It allows one size of
    small views only; here any. Under autocast it compares features in half precision, in which
    another region often looks most similar; here in float32. Features of zero norm and, where
    ``tokens`` tell the geometry, regions outside the image match nothing.

    What does better in this package: `NearestMatcher`, or `GatedSimilarityMatcher`, which compares
    features among near tokens only: on small data sets matches by similarity alone hurt (GLSD, WACV
    2023). With them ``normalize="matched"``, as they leave tokens without a match.
    """
    return GlobalLocalDistillationLoss(
        GlobalDistillationLoss(
            Centering(num_prototypes, center_momentum, process_group=process_group),
            student_temp=student_temp,
            process_group=process_group,
        ),
        LocalDistillationLoss(
            Centering(num_prototypes, center_momentum, process_group=process_group),
            student_temp=student_temp,
            normalize="all",
            process_group=process_group,
        ),
        SimilarityMatcher(),
        global_weight=0.5,
        local_weight=0.5,
    )
