"""VICReg's three terms, and its loss on the embeddings of whole views."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from local_distill._check import (
    Axes,
    check_floating,
    check_positive,
    check_sequence,
    check_view_pairs,
    check_weight,
)
from local_distill._precision import at_least_float32, widest
from local_distill.errors import ShapeError
from local_distill.losses._batch_statistics import (
    all_reduce_sum_with_gradient,
    batch_covariance,
    batch_variance,
)
from local_distill.losses._pairs import Pair, Processes
from local_distill.losses._wide_squares import sum_of_squares

__all__ = ["VICRegLoss", "covariance_loss", "invariance_loss", "variance_loss"]

_ALONE = Processes(active=False)


def invariance_loss(student: Tensor, teacher: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Mean squared difference of vectors that belong together.

    .. math:: s = Σ_i ||x_i - y_i||² / (N·d)

    Convention: both sides get a gradient, as VICReg has no teacher. No collectives.

    Args:
        student: (b, d) or (b, n, d).
        teacher: of the same shape.
        valid: (b,) or (b, n) bool, or None: the N vectors that count; the others may be NaN.

    Returns:
        A scalar in at least float32; 0 where nothing counts.

    Raises:
        ShapeError: axes that differ, no floating-point numbers, flags that are not bool.

    Example:
        >>> invariance_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
        tensor(0.5000)

    Source: "VICReg" (ICLR 2022), eq. 5.

    Deviations from the authors' code: none; both take the mean over d, which the paper's
    equation does not.
    """
    axes = Axes()
    x, flags = _positions("student", student, valid, axes)
    y, _ = _positions("teacher", teacher, None, axes)
    dtype = torch.promote_types(at_least_float32(x).dtype, at_least_float32(y).dtype)
    weight = x.new_ones(x.shape[:2], dtype=dtype) if flags is None else flags.to(dtype)
    return weighted_invariance(x, y, weight, _ALONE).to(dtype)


def variance_loss(
    values: Tensor, *, target_std: float = 1.0, eps: float = 1e-4, valid: Tensor | None = None
) -> Tensor:
    """Hinge that keeps the standard deviation over the batch above a target, channel by channel.

    .. math:: v = (1/d) Σ_j max(0, γ - sqrt(Var(x_j) + ε))

    Convention: the variance is unbiased and runs over the axis b alone. With n positions every one
    has statistics of its own, and the mean is over the positions that have two vectors or more;
    where none has, the loss is 0. No collectives.

    Args:
        values: (b, d) or (b, n, d).
        target_std: γ, above 0.
        eps: ε, above 0.
        valid: (b,) or (b, n) bool, or None: vectors that count; the others may be NaN.

    Returns:
        A scalar in at least float32.

    Raises:
        ShapeError: see `invariance_loss`.
        ConfigError: a γ or ε that is not above 0.

    Example:
        >>> variance_loss(torch.tensor([[0.0, 0.0], [0.0, 4.0]]), eps=1e-4)
        tensor(0.4950)

    Source: "VICReg" (ICLR 2022), eq. 1 and 2.

    Deviations from the authors' code: a batch of one gives 0, theirs NaN.
    """
    check_positive("target_std", target_std)
    check_positive("eps", eps)
    rows, flags = _positions("values", values, valid, Axes())
    variance, known = batch_variance(rows, flags, _ALONE)
    return variance_penalty(variance, known, target_std, eps)


def covariance_loss(values: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Sum of the squared covariances over the batch between different channels, over d.

    .. math:: c = (1/d) Σ_{i≠j} C_ij², C = Σ (x - mean)(x - mean)ᵀ / (N - 1)

    Convention: as `variance_loss`: over the axis b alone, position by position. It grows with the
    fourth power of the values: beyond about 1e9 it is more than float32 can say, and infinite.
    Its gradient grows with the third, and is right up to about 1e12. No collectives.

    Args:
        values: (b, d) or (b, n, d).
        valid: (b,) or (b, n) bool, or None: vectors that count; the others may be NaN.

    Returns:
        A scalar in at least float32. Takes n·d² numbers of memory.

    Raises:
        ShapeError: see `invariance_loss`.

    Example:
        >>> covariance_loss(torch.tensor([[0.0, 0.0], [2.0, 4.0]]))  # C_01 = 4
        tensor(16.)

    Source: "VICReg" (ICLR 2022), eq. 3 and 4.

    Deviations from the authors' code: a batch of one gives 0, theirs NaN; N is the number of
    vectors there are, theirs the batch size of the settings.
    """
    rows, flags = _positions("values", values, valid, Axes())
    covariance, known = batch_covariance(rows, flags, _ALONE)
    return covariance_penalty(covariance, known).to(covariance.dtype)


class VICRegLoss(nn.Module):
    """Invariance between views, variance and covariance within each: VICReg, for any list of views.

    .. math:: L = λ·mean_{(v,q)} s(x_v, x_q) + μ·mean_v v(x_v) + ν·mean_v c(x_v)

    Convention: there is no teacher, every view gets a gradient. The statistics are those of the
    whole batch of all processes; every rank returns the whole batch's value with its share's
    gradient, whatever the batch sizes, and assumes that gradients are averaged, as DDP does. In
    evaluation and under ``no_grad`` nothing is sent. With fewer than two images variance and
    covariance are 0. The terms are weighed and added in float64, so that the loss is infinite only
    where float32 cannot say it; the gradient does not depend on that, see `covariance_loss`. A term
    of weight 0 is left out, however large it is.

    Args:
        invariance_weight: λ, at least 0.
        variance_weight: μ, at least 0.
        covariance_weight: ν, at least 0.
        target_std: γ, above 0.
        eps: ε under the root, above 0.
        process_group: the processes over which gradients are averaged; None: all.

    Raises:
        ConfigError: a weight below 0, a γ or ε not above 0.

    Example:
        >>> loss = VICRegLoss()
        >>> views = [torch.tensor([[0.0, 1.0], [2.0, 3.0]]), torch.tensor([[0.0, 1.0], [2.0, 2.0]])]
        >>> loss(views)  # 25·0.25 + 25·(0 + 0.146)/2 + (4 + 1)/2
        tensor(10.5801)

    Source: "VICReg" (ICLR 2022, arXiv 2105.04906), eq. 6; averaged over the views as VICRegL
    (NeurIPS 2022) does, whose global term this is.

    Deviations from the authors' code: VICReg's code for two views takes the mean of their variance
    terms and the *sum* of their covariance terms, so it is ``covariance_weight=2`` here; the paper
    sums both, so it is ``variance_weight=50, covariance_weight=2``. Covariances are divided by the
    number of images that there are, VICReg's by the batch size of the settings. Each process works
    out the moments of its own images and sums them; the authors gather all embeddings, which wants
    a process group and equal batches on every rank.
    """

    def __init__(
        self,
        invariance_weight: float = 25.0,
        variance_weight: float = 25.0,
        covariance_weight: float = 1.0,
        *,
        target_std: float = 1.0,
        eps: float = 1e-4,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.invariance_weight = check_weight("invariance_weight", invariance_weight)
        self.variance_weight = check_weight("variance_weight", variance_weight)
        self.covariance_weight = check_weight("covariance_weight", covariance_weight)
        self.target_std = check_positive("target_std", target_std)
        self.eps = check_positive("eps", eps)
        self.process_group = process_group

    def forward(
        self, embeddings: Sequence[Tensor], *, pairs: Iterable[Pair] | None = None
    ) -> Tensor:
        """The loss of a step.

        Args:
            embeddings: per view (b, d).
            pairs: of views whose embeddings are to agree; None: all pairs of different views.
                VICRegL: every global view with every other.

        Returns:
            A scalar in at least float32.

        Raises:
            ShapeError: fewer than two views, axes that differ, a pair of views not there.
        """
        check_sequence("embeddings", embeddings, "a tensor of embeddings")
        views = len(embeddings)
        axes = Axes()
        for view, values in enumerate(embeddings):
            check_floating(f"embeddings[{view}]", axes.bind(f"embeddings[{view}]", values, "b d"))
        wanted = (
            [(v, q) for v in range(views) for q in range(v + 1, views)]
            if pairs is None
            else list(pairs)
        )
        if not wanted:
            raise ShapeError(
                f"`pairs` is empty: {views} views make no pair of different views; give two views"
            )
        check_view_pairs(wanted, views, views)
        processes = Processes(self.training and torch.is_grad_enabled(), self.process_group)
        # A whole view is one position of each image.
        rows = [values[:, None] for values in embeddings]
        weight = at_least_float32(rows[0]).new_ones(axes["b"], 1)
        invariance = [weighted_invariance(rows[v], rows[q], weight, processes) for v, q in wanted]
        variance, covariance = zip(
            *(self.penalties(part, None, processes) for part in rows), strict=True
        )
        total = self.weighted(
            *(torch.stack(terms).mean() for terms in (invariance, variance, covariance))
        )
        dtypes = [at_least_float32(values).dtype for values in embeddings]
        return total.to(functools.reduce(torch.promote_types, dtypes))

    def weighted(self, invariance: Tensor, variance: Tensor, covariance: Tensor) -> Tensor:
        """The weighted sum of the three terms, in the widest type of the device."""
        weights = self.invariance_weight, self.variance_weight, self.covariance_weight
        terms = zip(weights, (invariance, variance, covariance), strict=True)
        # Left out, as 0 · inf is NaN.
        counted = [weight * widest(term) for weight, term in terms if weight]
        return torch.stack(counted).sum() if counted else 0.0 * invariance

    def penalties(
        self, values: Tensor, valid: Tensor | None, processes: Processes
    ) -> tuple[Tensor, Tensor]:
        """`variance_loss` and `covariance_loss` of (b, n, d), over the batch of all processes.

        The second in the widest type of the device.
        """
        covariance, known = batch_covariance(values, valid, processes)
        variance = covariance.diagonal(dim1=1, dim2=2)
        return (
            variance_penalty(variance, known, self.target_std, self.eps),
            covariance_penalty(covariance, known),
        )

    def extra_repr(self) -> str:
        """The settings, for print."""
        return (
            f"invariance_weight={self.invariance_weight}, variance_weight={self.variance_weight}, "
            f"covariance_weight={self.covariance_weight}, target_std={self.target_std}, "
            f"eps={self.eps}"
        )


def weighted_invariance(x: Tensor, y: Tensor, weight: Tensor, processes: Processes) -> Tensor:
    """`invariance_loss` of (b, n, d) with a weight (b, n) for each vector, in the widest type."""
    x, y = at_least_float32(x), at_least_float32(y)
    weight = weight.to(torch.promote_types(x.dtype, y.dtype))
    # Before the square, not after: 0 · NaN is NaN, in the gradient too.
    difference = torch.where((weight > 0)[..., None], x - y, 0.0)
    squares = sum_of_squares(difference)
    total = all_reduce_sum_with_gradient((weight * squares).sum(), processes)
    mass = processes.sum(weight.sum()) * x.shape[-1]
    return total / torch.where(mass > 0, mass, 1.0)


def variance_penalty(variance: Tensor, known: Tensor, target_std: float, eps: float) -> Tensor:
    """Mean hinge of variances (n, d) over the ``known`` (n,) positions."""
    return _mean_of_known((target_std - (variance + eps).sqrt()).relu().mean(-1), known)


def covariance_penalty(covariance: Tensor, known: Tensor) -> Tensor:
    """Mean over the ``known`` (n,) positions of Σ squares off the diagonal of (n, d, d), over d.

    In the widest type.
    """
    d = covariance.shape[-1]
    diagonal = torch.eye(d, dtype=torch.bool, device=covariance.device)
    squares = sum_of_squares(covariance.masked_fill(diagonal, 0.0), axes=2)
    return _mean_of_known(squares / max(d, 1), known)


def _mean_of_known(values: Tensor, known: Tensor) -> Tensor:
    return torch.where(known, values, 0.0).sum() / known.sum().clamp_min(1)


def _positions(
    name: str, values: Tensor, valid: Tensor | None, axes: Axes
) -> tuple[Tensor, Tensor | None]:
    """Checked values as (b, n, d) and flags as (b, n); (b, d) is one position of each image."""
    local = isinstance(values, Tensor) and values.dim() == 3
    check_floating(name, axes.bind(name, values, "b n d" if local else "b d"))
    if valid is not None:
        axes.bind("valid", valid, "b n" if local else "b")
        if valid.dtype != torch.bool:
            raise ShapeError(f"`valid` must be bool, got {valid.dtype}; convert with .bool()")
    if local:
        return values, valid
    return values[:, None], None if valid is None else valid[:, None]
