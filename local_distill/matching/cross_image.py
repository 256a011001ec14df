"""CrIBo's matches: objects of other images, out of a queue, kept if the way back leads home."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from local_distill._check import Axes, check_at_least
from local_distill._precision import undo_half_precision
from local_distill.distributed import all_gather_rows
from local_distill.errors import ConfigError, ShapeError
from local_distill.matching._inputs import FeatureSide, feature_inputs
from local_distill.matching._queue_search import leads_home, nearest_rows
from local_distill.matching._results import hard_matches, no_matches
from local_distill.matching._unit_features import unit_features, unit_side
from local_distill.structures import Matches, Tokens

__all__ = ["CrossImageQueue"]

# What stands for the image of a row that came without one.
_UNKNOWN = -1


class CrossImageQueue(nn.Module):
    """Match objects to those of earlier images, both views of which are kept in a queue.

    .. math:: j(i) = argmax_j cos(x_i, q_j), cost_i = 1 - cos(x_i, q_{j(i)})

    kept only if argmax_l cos(y_l, q'_{j(i)}) = i: object i is seen as x_i in the student's view and
    as y_i in the teacher's, row j of the queue as q_j and q'_j in the same two views. Out in one
    view, back in the other.

    Convention: object i of `student` is object i of `teacher`: pooled `Clusters`, or tokens brought
    together by other `Matches`, or twice the same tokens (then the check asks for mutual nearest
    neighbours). Objects that are not finite or of zero norm, as pooled clusters that are not valid
    are, are never matched and never capture a match; nor do rows that nothing was written to, and
    rows of the same image where ``image_id`` says so. Ties go to the lowest row. `forward` changes
    nothing; `update` alone does: call it after use, so that no object meets itself. The state stays
    float32 under ``half()``.

    How the parts go together: gather first, then the teacher's head, on the few rows that were
    found, and not on the whole queue; the answers then stand beside the objects, see the example.

    Args:
        num_images: how many images are kept; the oldest go first. CrIBo: 25,000.
        num_objects: n, objects of one image: the k of its clusters.
        feature_dim: d. The queue takes 8·num_images·n·d bytes.
        normalize: whether the queue's rows are compared by cosine; False: by their product with
            the object of length 1, ``normalized_matching`` in CrIBo's code. The cost is of the
            cosine all the same.
        cycle: ``"batch"``: the way back has to find object i among all objects of the batch, as
            published; ``"image"``: among its own image's, so that images do not depend on each
            other; None: all are kept.
        process_group: the processes whose objects the queue takes in; None: all of them.

    Raises:
        ConfigError: a size below 1, an unknown ``cycle``.

    Example:
        >>> queue = CrossImageQueue(num_images=4, num_objects=2, feature_dim=2)
        >>> old = Tokens(torch.tensor([[[3.0, 0.0], [0.0, 4.0]]]))
        >>> queue.update(old, old)
        >>> one = Tokens(torch.tensor([[[0.1, 1.0], [0.2, 0.9]]]))
        >>> two = Tokens(torch.tensor([[[0.0, 1.0], [0.3, 0.9]]]))
        >>> matches = queue(one, two)
        >>> matches.teacher_index[..., 0], matches.matched  # both find row 1; it finds the first
        (tensor([[1, 1]]), tensor([[ True, False]]))
        >>> found = matches.gather(queue.rows(view=0).expand(1, -1, -1))
        >>> found  # what the teacher's head takes; then comes Matches.identity(matches.matched)
        tensor([[[0., 4.],
                 [0., 0.]]])

    Source: "CrIBo: Self-Supervised Learning via Cross-Image Object-Level Bootstrapping" (ICLR 2024,
    arXiv 2310.07855), its cycle-consistent matching through a memory bank.

    Deviations from the authors' code: the queue starts empty, theirs with random rows that are
    matched like others; it keeps the latest ``num_images`` images as theirs does, but in fixed
    places, so that nothing is moved or synced; rows are not kept in order of age, so that equal
    rows may be told apart otherwise; the queue of [CLS] tokens, which theirs fills and never reads,
    is left out.
    """

    features: Tensor
    valid: Tensor
    image_id: Tensor
    position: Tensor
    count: Tensor
    skipped: Tensor

    def __init__(
        self,
        num_images: int = 25_000,
        *,
        num_objects: int,
        feature_dim: int,
        normalize: bool = True,
        cycle: Literal["batch", "image"] | None = "batch",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.num_images = check_at_least("num_images", num_images, 1)
        self.num_objects = check_at_least("num_objects", num_objects, 1)
        self.feature_dim = check_at_least("feature_dim", feature_dim, 1)
        if cycle not in ("batch", "image", None):
            raise ConfigError(f'`cycle` must be "batch", "image" or None, got {cycle!r}')
        self.normalize = bool(normalize)
        self.cycle: Literal["batch", "image"] | None = cycle
        self.process_group = process_group
        self.register_buffer("features", torch.zeros(2, num_images, num_objects, feature_dim))
        self.register_buffer("valid", torch.zeros(num_images, num_objects, dtype=torch.bool))
        self.register_buffer("image_id", torch.full((num_images,), _UNKNOWN))
        # Where the next image goes, how many there are, how many objects were not finite.
        for name in ("position", "count", "skipped"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    def rows(self, view: Literal[0, 1] = 0) -> Tensor:
        """(num_images·n, d): the queue as one view saw it, what ``teacher_index`` points into."""
        return self.features[view].flatten(0, 1)

    @torch.no_grad()
    def forward(
        self,
        student: Tokens,
        teacher: Tokens,
        *,
        view: Literal[0, 1] = 0,
        image_id: Tensor | None = None,
    ) -> Matches:
        """Match the student's objects to rows of the queue.

        Args:
            student: `Tokens` with features (b, n, d), the objects that look for an answer.
            teacher: `Tokens` with features (b, n, d), the same objects in the other view.
            view: which of the queue's views is the student's. Once each way, as published:
                ``queue(one, two)`` and ``queue(two, one, view=1)``.
            image_id: (b,) int64 ≥ 0, which images these are; rows of the same image are left out.

        Returns:
            `Matches` with k = 1; ``teacher_index`` into ``rows(view)``.

        Raises:
            ShapeError: no features, axes that differ.
            ConfigError: a view that is neither 0 nor 1.
        """
        if view not in (0, 1):
            raise ConfigError(f"`view` must be 0 or 1, got {view!r}")
        own, other = self._sides(student, teacher, image_id)
        dtype = torch.promote_types(own.features.dtype, self.features.dtype)
        x, x_valid = unit_side(own, dtype)
        y, y_valid = unit_side(other, dtype)
        b, n, _ = x.shape
        if b == 0 or n == 0:
            return no_matches(b, n, 1, x)
        allowed = self.valid.flatten().expand(b, -1)
        if image_id is not None:
            other_image = self.image_id != image_id[:, None]
            allowed = allowed & other_image.repeat_interleave(self.num_objects, 1)
        index, found = nearest_rows(x, self.rows(view), allowed, normalize=self.normalize)
        chosen = unit_features(self.rows(view)[index].to(dtype))[0]
        cost = (1 - (x * chosen).sum(-1)).clamp_min(0.0)
        keep = found & x_valid
        if self.cycle is not None:
            back = unit_features(self.rows(_opposite(view))[index].to(dtype))[0]
            keep = keep & y_valid & leads_home(back, y, y_valid, self.cycle)
        return hard_matches(index, keep, cost)

    @torch.no_grad()
    def update(
        self,
        student: Tokens,
        teacher: Tokens,
        *,
        valid: Tensor | None = None,
        image_id: Tensor | None = None,
    ) -> None:
        """Take these objects of all processes in, in the order of ranks, in place of the oldest.

        An object that is not finite or of zero norm in either view does not enter, and is counted
        in ``skipped``. Of more images than the queue holds the first are taken, as published.

        Args:
            student: `Tokens` with features (b, n, d), the objects in the queue's view 0.
            teacher: `Tokens` with features (b, n, d), the same objects in its view 1.
            valid: (b, n) bool, such as ``Clusters.valid``: objects that are none do not enter, and
                are not counted. None: all are.
            image_id: (b,) int64 ≥ 0 which images these are.

        Raises:
            ShapeError: as `forward`, or a number of objects that is not the queue's.
        """
        sides = self._sides(student, teacher, image_id)
        b, n, _ = sides[0].features.shape
        if n != self.num_objects:
            raise ShapeError(
                f"`student.features` holds {n} objects an image but this queue was made for "
                f"num_objects={self.num_objects}"
            )
        device = self.features.device
        if valid is None:
            wanted = torch.ones((b, n), dtype=torch.bool, device=device)
        else:
            wanted = Axes().bind("valid", valid, f"{b} {n}").bool()
        for side in sides:
            wanted = wanted if side.inside is None else wanted & side.inside
        if image_id is None:
            image_id = torch.full((b,), _UNKNOWN, device=device)
        # In the state's dtype before it is looked at: 1e300 is infinite there.
        rows = torch.stack([side.features.to(self.features.dtype) for side in sides], 1)
        rows = all_gather_rows(rows, self.process_group)
        wanted = all_gather_rows(wanted, self.process_group)
        image_id = all_gather_rows(image_id, self.process_group)
        good = wanted & unit_features(rows)[1].all(1)
        self.skipped.add_((wanted & ~good).sum())
        rows = torch.where(good[:, None, :, None], rows, 0.0)
        taken = min(rows.shape[0], self.num_images)
        places = (self.position + torch.arange(taken, device=device)) % self.num_images
        self.features.index_copy_(1, places, rows[:taken].transpose(0, 1))
        self.valid.index_copy_(0, places, good[:taken])
        self.image_id.index_copy_(0, places, image_id[:taken])
        self.position.add_(taken).remainder_(self.num_images)
        self.count.add_(taken).clamp_(max=self.num_images)

    def extra_repr(self) -> str:
        """The settings, for print."""
        return (
            f"num_images={self.num_images}, num_objects={self.num_objects}, "
            f"feature_dim={self.feature_dim}, normalize={self.normalize}, cycle={self.cycle!r}"
        )

    def _sides(
        self, student: Tokens, teacher: Tokens, image_id: Tensor | None
    ) -> tuple[FeatureSide, FeatureSide]:
        own, other = feature_inputs(student, teacher)
        axes = Axes()
        axes.bind("student.features", own.features, "b n d")
        axes.bind("teacher.features", other.features, "b n d")
        if axes["d"] != self.feature_dim:
            raise ShapeError(
                f"axis `d` is {axes['d']} in `student.features` (shape "
                f"{tuple(own.features.shape)}) but this queue was made for "
                f"feature_dim={self.feature_dim}"
            )
        if image_id is not None and axes.bind("image_id", image_id, "b").dtype != torch.int64:
            raise ShapeError(
                f"`image_id` must be int64, got {image_id.dtype}; convert with .long()"
            )
        return own, other

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CrossImageQueue:
        # Rows rounded to half precision would find other neighbours: half() and to(bfloat16)
        # change the network around the queue, not the queue.
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        undo_half_precision(self, before)
        return self


def _opposite(view: Literal[0, 1]) -> Literal[0, 1]:
    return 0 if view == 1 else 1
