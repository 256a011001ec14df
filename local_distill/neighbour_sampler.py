"""AdaSim's sampler: whose view an image is shown beside, its own or a voted neighbour's."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from local_distill._check import (
    Axes,
    check_at_least,
    check_floating,
    check_positive,
    values_visible,
)
from local_distill._precision import at_least_float32, no_autocast, undo_half_precision
from local_distill.distributed import all_gather_rows
from local_distill.errors import ConfigError, ShapeError

__all__ = ["NeighbourDistribution", "NeighbourSampler"]

# What stands for a neighbour where there was none.
_NONE = -1


class NeighbourDistribution(NamedTuple):
    """From which images each image's second view may come.

    Attributes:
        candidates: (b, k) int64 images, the one of most votes first; the image itself where there
            are fewer.
        probs: (b, k), sums to 1.
        adaptive: (b,) bool, there are votes and the image itself leads them; where it does not, it
            is the only candidate.
    """

    candidates: Tensor
    probs: Tensor
    adaptive: Tensor


class NeighbourSampler(nn.Module):
    r"""Chooses for each image of a data set whether its second view is its own or a neighbour's.

    .. math:: v_i(j) = \tfrac1V Σ_{e=1}^V cos(z_i^e, z_j^{e-1}) [j ∈ top_k^e(i)], \quad
        j^* \sim softmax_{top_k}(v_i / τ) \text{ if } argmax_j v_i(j) = i, \text{ else } j^* = i

    z_i^e is the image's feature in epoch e. In each epoch an image votes for those k images of the
    data set whose last features are most similar to its new ones, itself included, by their cosine.
    Votes of V epochs are summed. An image that does not find itself first is where features cannot
    be trusted yet, and keeps its own second view; as long as there are fewer than V epochs all do.

    Convention: `observe` in every step, `end_epoch` after every epoch, `draw` when data is loaded;
    nothing else changes the state. ``observe`` takes what all processes saw, in the order of ranks,
    so that the state is equal on all of them; of an image that comes twice the last counts.
    Features that are not finite or of zero norm do not enter, and are counted in ``skipped``. An
    image that an epoch did not show votes as in the epoch before. The state stays float32 under
    ``half()``. It takes N·(4·d + 8·k·(V + 1)) bytes: 7.2 GB for ImageNet-1k, d = 384, k = 10 and
    V = 50. Data-loading workers need votes alone: let the main process `draw` an epoch's partners.

    Args:
        num_images: N, the size of the data set.
        feature_dim: d.
        top_k: k, neighbours of a vote, from 1 to N.
        votes: V, epochs that are summed.
        temp: τ, above 0.
        process_group: the processes whose images are observed; None: all of them.

    Raises:
        ConfigError: a size below 1, more neighbours than images, a temperature not above 0.

    Example:
        >>> sampler = NeighbourSampler(3, feature_dim=2, top_k=2, votes=1, temp=0.1)
        >>> everything = torch.arange(3)
        >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
        >>> for _ in range(2):  # in the first epoch there is nothing to vote for yet
        ...     sampler.observe(everything, features)
        ...     sampler.end_epoch()
        >>> found = sampler.distribution(everything)
        >>> found.candidates[0], found.probs[0]
        (tensor([0, 1]), tensor([0.5124, 0.4876]))
        >>> sampler.draw(torch.tensor([2]), generator=torch.Generator().manual_seed(0))
        tensor([2])

    Source: "Adaptive Similarity Bootstrapping for Self-Distillation based Representation Learning"
    (AdaSim, ICCV 2023, arXiv 2303.13606), algorithm 1; the defaults are those of the authors' code,
    where votes are averaged before the softmax.

    Deviations from the authors' code: images without a feature yet are no candidates, theirs have
    features of 0; they enter the votes of theirs with a similarity of 0. Their votes are moved by
    one place every epoch; ours stay in a ring. An image that comes twice in a step leaves one of
    both features there, which one is not defined. The state is part of ``state_dict`` here.
    """

    features: Tensor
    known: Tensor
    current_index: Tensor
    current_similarity: Tensor
    vote_index: Tensor
    vote_similarity: Tensor
    epochs: Tensor
    skipped: Tensor

    def __init__(
        self,
        num_images: int,
        *,
        feature_dim: int,
        top_k: int = 10,
        votes: int = 50,
        temp: float = 0.001,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.num_images = check_at_least("num_images", num_images, 1)
        self.feature_dim = check_at_least("feature_dim", feature_dim, 1)
        self.top_k = check_at_least("top_k", top_k, 1)
        if top_k > num_images:
            raise ConfigError(f"`top_k` must not be above `num_images` = {num_images}, got {top_k}")
        self.votes = check_at_least("votes", votes, 1)
        self.temp = check_positive("temp", temp)
        self.process_group = process_group
        self.register_buffer("features", torch.zeros(num_images, feature_dim))
        self.register_buffer("known", torch.zeros(num_images, dtype=torch.bool))
        # int32 halves the largest part; a data set of 2³¹ images would not fit anyway.
        nobody = torch.full((num_images, top_k), _NONE, dtype=torch.int32)
        self.register_buffer("current_index", nobody)
        self.register_buffer("current_similarity", torch.zeros(num_images, top_k))
        self.register_buffer("vote_index", nobody[None].repeat(votes, 1, 1))
        self.register_buffer("vote_similarity", torch.zeros(votes, num_images, top_k))
        for name in ("epochs", "skipped"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def observe(self, index: Tensor, features: Tensor) -> None:
        """Let the images of a step, of all processes, vote; then keep their features.

        Args:
            index: (b,) int64 in [0, N), which images these are.
            features: (b, d), as published the teacher's backbone features of the first view.

        Raises:
            ShapeError: axes that differ, an index that is not int64 or, where that can be seen
                without a device sync, is out of range.
        """
        axes = Axes()
        index = self._check_index(index, axes)
        check_floating("features", axes.bind("features", features, "b d"))
        if axes["d"] != self.feature_dim:
            raise ShapeError(
                f"axis `d` is {axes['d']} in `features` (shape {tuple(features.shape)}) but this "
                f"sampler was made for feature_dim={self.feature_dim}"
            )
        units, good = _unit_rows(features.to(self.features))
        # As the state was before this step: a step's images do not see each other.
        nearest, similarity = self._nearest(units)
        group = self.process_group
        index = all_gather_rows(index.to(self.features.device), group)
        units, good = all_gather_rows(units, group), all_gather_rows(good, group)
        nearest = all_gather_rows(nearest, group)
        similarity = all_gather_rows(similarity, group)
        self.skipped.add_((~good).sum())
        if index.shape[0] == 0:
            return
        # Every row of an image carries what its last good row says, so that whichever is written
        # last, on whatever device, the state is the same.
        order = torch.arange(1, index.shape[0] + 1, device=index.device)
        last = torch.where((index[:, None] == index) & good, order, 0).amax(1)
        seen = last > 0
        source = (last - 1).clamp_min(0)
        for state, rows in (
            (self.features, units),
            (self.current_index, nearest),
            (self.current_similarity, similarity),
        ):
            state.index_copy_(0, index, torch.where(seen[:, None], rows[source], state[index]))
        self.known.index_copy_(0, index, seen | self.known[index])

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Cast the votes of this epoch; those of V epochs ago are forgotten."""
        place = (self.epochs % self.votes)[None]
        self.vote_index.index_copy_(0, place, self.current_index[None])
        self.vote_similarity.index_copy_(0, place, self.current_similarity[None])
        self.epochs.add_(1)

    @torch.no_grad()
    def distribution(self, index: Tensor) -> NeighbourDistribution:
        """From which images the second views of these images may come.

        Args:
            index: (b,) int64 in [0, N).

        Returns:
            `NeighbourDistribution`.

        Raises:
            ShapeError: as `observe`.
        """
        index = self._check_index(index, Axes()).to(self.vote_index.device)
        ballots = self.vote_index[:, index].transpose(0, 1).flatten(1).to(torch.int64)
        weights = self.vote_similarity[:, index].transpose(0, 1).flatten(1)
        # Votes for the same image stand side by side, and are summed into its first place.
        ballots, order = ballots.sort(dim=1, stable=True)
        weights = weights.gather(1, order)
        begins = torch.ones_like(ballots, dtype=torch.bool)
        begins[:, 1:] = ballots[:, 1:] != ballots[:, :-1]
        place = begins.cumsum(1) - 1
        sums = torch.zeros_like(weights).scatter_add_(1, place, weights)
        names = torch.full_like(ballots, _NONE).scatter_(1, place, ballots)
        sums = torch.where(names == _NONE, -torch.inf, sums)
        best, found = sums.topk(self.top_k, dim=1)
        names = names.gather(1, found)
        adaptive = (self.epochs >= self.votes) & (names[:, 0] == index)
        exists = (names != _NONE) & adaptive[:, None]
        first = torch.arange(self.top_k, device=index.device) == 0
        scores = torch.where(exists, best / self.votes / self.temp, -torch.inf)
        # The image itself, alone, where it is not to be shown beside others.
        scores = torch.where(first & ~adaptive[:, None], 0.0, scores)
        candidates = torch.where(exists, names, index[:, None])
        return NeighbourDistribution(candidates, scores.softmax(-1), adaptive)

    @torch.no_grad()
    def draw(self, index: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw the image that each image's second view comes from.

        Args:
            index: (b,) int64 in [0, N).
            generator: on the state's device.

        Returns:
            (b,) int64; the image itself where it keeps its own second view.

        Raises:
            ShapeError: as `observe`.
        """
        found = self.distribution(index)
        if index.shape[0] == 0:
            return found.candidates[:, 0]
        chosen = found.probs.multinomial(1, generator=generator)
        return found.candidates.gather(1, chosen)[:, 0]

    def extra_repr(self) -> str:
        """The settings, for print."""
        return (
            f"num_images={self.num_images}, feature_dim={self.feature_dim}, top_k={self.top_k}, "
            f"votes={self.votes}, temp={self.temp}"
        )

    def _nearest(self, units: Tensor) -> tuple[Tensor, Tensor]:
        """(b, k) the images most similar to these, and how much; _NONE and 0 for none."""
        with no_autocast(units):
            similarity = units @ self.features.mT
        similarity = torch.where(self.known, similarity, -torch.inf)
        best, nearest = similarity.topk(self.top_k, dim=1)
        exists = best > -torch.inf
        nearest = torch.where(exists, nearest, _NONE).to(torch.int32)
        return nearest, torch.where(exists, best, 0.0)

    def _check_index(self, index: Tensor, axes: Axes) -> Tensor:
        index = axes.bind("index", index, "b")
        if index.dtype != torch.int64:
            raise ShapeError(f"`index` must be int64, got {index.dtype}; convert with .long()")
        if values_visible(index) and bool(((index < 0) | (index >= self.num_images)).any()):
            raise ShapeError(
                f"`index` must lie in [0, num_images) = [0, {self.num_images}), got "
                f"{int(index.min())} to {int(index.max())}"
            )
        return index

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NeighbourSampler:
        # half() and to(bfloat16) change the network around the sampler, not what it remembers.
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        undo_half_precision(self, before)
        return self


def _unit_rows(features: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (b, d) of length 1, and (b,) bool: which are finite and not 0; the others are 0."""
    wide = at_least_float32(features)
    largest = wide.abs().amax(-1, keepdim=True)
    good = largest.isfinite() & (largest > 0)
    scaled = torch.where(good, wide / largest, 0.0)
    length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return torch.where(good, scaled / length, 0.0), good[:, 0]


torch.serialization.add_safe_globals([NeighbourDistribution])
