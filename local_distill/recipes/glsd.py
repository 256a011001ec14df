"""GLSD: whole views, and tokens matched by where they lie in the image."""

from __future__ import annotations

from typing import Literal

import torch.distributed as dist

from local_distill.errors import ConfigError
from local_distill.losses.global_local import GlobalLocalDistillationLoss
from local_distill.matching.nearest import NearestMatcher
from local_distill.recipes.esvit import esvit

__all__ = ["glsd"]

Matching = Literal["geometric", "similarity"]


def glsd(
    num_prototypes: int = 65_536,
    *,
    matching: Matching = "geometric",
    max_distance: float | None = 0.5,
    student_temp: float = 0.1,
    center_momentum: float = 0.9,
    process_group: dist.ProcessGroup | None = None,
) -> GlobalLocalDistillationLoss:
    """GLSD: DINO's loss, and the same for each token against the one nearest to it in the image.

    .. math:: L = ½·L_global + ½·mean_{(v,q)} mean_{b,i} w_i·[-P_{j(i)}·log softmax(s_i / τ)]

    with j(i) the teacher's token whose centre is nearest, and w_i = 1 where it is nearer than
    ``max_distance``, otherwise 0.

    Convention: ``loss(student, teacher, teacher_temp=...)`` with `ViewOutput` of all three parts:
    ``tokens`` with geometry and grid, for ``"similarity"`` with the backbone's features. Views and
    tokens have centers of their own. Tokens without a match count in the mean (``"all"``).
    Published settings that are not part of the loss: a head for views and one for tokens, each
    `ProjectionHead` with 3 layers of 2,048, a bottleneck of 256 and 65,536 prototypes, whose norm
    is learnt; τ_t from 0.04 to 0.07 over 30 epochs; teacher momentum from 0.996 to 1 along a
    cosine; two views of 224 × 224 of 40 to 100 % of the image and eight of 96 × 96 of 5 to 40 %,
    mirrored or not; 300 epochs of AdamW, learning rate 5e-4 · batch / 256. So the commands of the
    published README have it. The parser alone has other defaults: τ_t of 0.04 throughout, 100
    epochs, a norm that stands still.

    Args:
        num_prototypes: c, of views and of tokens.
        matching: ``"geometric"``, the method, or ``"similarity"``, with which the paper compares
            it: EsViT's, see `esvit`.
        max_distance: in larger cell diagonals; None: every token has a match. Not looked at with
            ``"similarity"``.
        student_temp: τ, above 0.
        center_momentum: of the running means of the teacher's logits, in [0, 1).
        process_group: the processes over which gradients are averaged; None: all.

    Returns:
        `GlobalLocalDistillationLoss`, whose forward gives `DistillationTerms`.

    Raises:
        ConfigError: a setting out of range, an unknown matching.

    Example:
        >>> import torch
        >>> from local_distill import TokenGrid, Tokens, ViewOutput, from_box
        >>> loss = glsd(num_prototypes=8)
        >>> grid = TokenGrid.tiling(2, 3, view_size=(32, 48))
        >>> boxes = [torch.tensor([[0.0, 0, 48, 32]]), torch.tensor([[16.0, 0, 64, 32]])]
        >>> views = [ViewOutput(torch.zeros(1, 8), torch.zeros(1, 6, 8),
        ...                     Tokens(None, from_box(box, (32, 48), (40, 64)), grid))
        ...          for box in boxes]
        >>> terms = loss(views, views, teacher_temp=0.04)
        >>> terms.global_loss, terms.local_loss  # a flat student: ln 8; 4 of 6 tokens are matched
        (tensor(2.0794), tensor(1.3863))

    Source: "Global-Local Self-Distillation for Visual Representation Learning" (WACV 2023);
    loss and matches as in its published code.

    Deviations from the authors' code: none in loss, gradient and centers where the matches are the
    same. It reads a token's place from a map of pixel positions that it crops and resizes with the
    image, which bends by up to 0.05 pixels at the border; of tokens almost equally far from two
    others one in a thousand goes to the other. It allows one size of small views only and square
    tokens; here any. Tokens outside the image (padding) match nothing.

    What does better in this package: ``normalize="matched"``, the default of
    `LocalDistillationLoss`, as otherwise crops that overlap little also learn little from where
    they do; `BilinearMatcher` or `OverlapMatcher`, which blend the tokens that a cell lies over.
    """
    if matching not in ("geometric", "similarity"):
        raise ConfigError(f"`matching` must be 'geometric' or 'similarity', got {matching!r}")
    loss = esvit(
        num_prototypes,
        student_temp=student_temp,
        center_momentum=center_momentum,
        process_group=process_group,
    )
    if matching == "geometric":
        loss.matcher = NearestMatcher(max_distance)
    return loss
