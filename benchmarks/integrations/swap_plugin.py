"""A pytest plugin: kornia's and Lightly's tests then meet our parts under their names.

    pytest -p benchmarks.integrations.swap_plugin tests/feature/test_matching.py

Each adapter has their signature and gives the work to a part of ours. It replaces their name before
their test module is imported. Where ``SWAP_RECORD`` names a file, a line of JSON is added to it for
every test: its id, how it ended, and how often a part of ours ran in it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from local_distill import (
    Centering,
    GlobalDistillationLoss,
    KeepBest,
    KoLeoLoss,
    MaskedDistillationLoss,
    Matches,
    Mutual,
    SimilarityMatcher,
    Tokens,
    VICRegLLoss,
    VICRegLoss,
)
from local_distill.errors import ShapeError

__all__ = ["SWAPS"]

_ran = [0]


def _used() -> None:
    _ran[0] += 1


def _descriptor_matches(matcher: Any, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """Kornia's form: distances (m, 1) and index pairs (m, 2) of what is matched."""
    _used()
    matches = matcher(Tokens(one[None]), Tokens(two[None]))
    if not matches.teacher_index.shape[-1]:
        return one.new_empty(0, 1), torch.empty(0, 2, dtype=torch.long, device=one.device)
    rows = matches.matched[0].nonzero()[:, 0]
    index = matches.teacher_index[0, rows, 0]
    # No gradient flows through a match; whoever wants one takes it from what was matched.
    return (one[rows] - two[index]).norm(dim=-1, keepdim=True), torch.stack((rows, index), 1)


def match_nn(desc1: Tensor, desc2: Tensor, dm: None = None) -> tuple[Tensor, Tensor]:
    """Kornia's ``match_nn`` by `SimilarityMatcher`."""
    return _descriptor_matches(SimilarityMatcher("l2"), desc1, desc2)


def match_mnn(desc1: Tensor, desc2: Tensor, dm: None = None) -> tuple[Tensor, Tensor]:
    """Kornia's ``match_mnn`` by `Mutual`."""
    return _descriptor_matches(Mutual(SimilarityMatcher("l2")), desc1, desc2)


def most_similar_index(x: Tensor, y: Tensor) -> Tensor:
    """Lightly's function by `SimilarityMatcher`."""
    _used()
    return SimilarityMatcher()(Tokens(x), Tokens(y)).teacher_index[..., 0]


def select_most_similar(x: Tensor, y: Tensor, y_values: Tensor) -> Tensor:
    """Lightly's function by `SimilarityMatcher` and ``Matches.gather``."""
    _used()
    return SimilarityMatcher()(Tokens(x), Tokens(y)).gather(y_values)


def nearest_neighbors(
    input_maps: Tensor, candidate_maps: Tensor, distances: Tensor, num_matches: int | None
) -> tuple[Tensor, Tensor]:
    """Lightly's function: ``Matches.compact`` keeps the best of matches made from distances."""
    _used()
    cost, index = distances.float().min(dim=2)
    matches = Matches(index[..., None], torch.ones_like(cost)[..., None], cost)
    most = input_maps.shape[1]
    count = most if num_matches is None or num_matches == -1 else min(num_matches, most)
    rows, kept = matches.compact(count)
    gathered = kept.gather(candidate_maps.float()).to(candidate_maps.dtype)
    return input_maps.take_along_dim(rows[..., None], 1), gathered


class LightlyVICRegLoss(nn.Module):
    """Two views (b, d) by `VICRegLoss`, or (b, n, d) by the local term of `VICRegLLoss`."""

    def __init__(
        self,
        lambda_param: float = 25.0,
        mu_param: float = 25.0,
        nu_param: float = 1.0,
        gather_distributed: bool = False,
        eps: float = 1e-4,
    ) -> None:
        super().__init__()
        _used()
        # Theirs sums the covariances of both views, ours takes their mean.
        weights = lambda_param, mu_param, 2 * nu_param
        self.whole = VICRegLoss(*weights, eps=eps)
        names = ("invariance_weight", "variance_weight", "covariance_weight")
        self.local = VICRegLLoss(alpha=0.0, **dict(zip(names, weights, strict=True)))

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        if z_a.dim() == 2:
            return self.whole([z_a, z_b])
        each = Matches.identity(torch.ones(z_a.shape[:2], dtype=torch.bool, device=z_a.device))
        return self.local([z_a[:, 0], z_b[:, 0]], [z_a, z_b], {(0, 1): each}).loss


class LightlyVICRegLLoss(nn.Module):
    """`VICRegLLoss`, with matches by the grids' points and by features."""

    def __init__(self, num_matches: tuple[int, int] = (20, 4)) -> None:
        super().__init__()
        _used()
        self.num_matches = num_matches
        self.loss = VICRegLLoss()

    def forward(
        self,
        global_view_features: Sequence[tuple[Tensor, Tensor]],
        global_view_grids: Sequence[Tensor],
        local_view_features: Sequence[tuple[Tensor, Tensor]] | None = None,
        local_view_grids: Sequence[Tensor] | None = None,
    ) -> Tensor:
        views = [*global_view_features, *(local_view_features or [])]
        grids = [*global_view_grids, *(local_view_grids or [])]
        if len(grids) != len(views):
            raise ShapeError(f"there are {len(grids)} grids of {len(views)} views")
        tokens = [patches.flatten(1, 2) for _, patches in views]
        points = [grid.flatten(1, 2) for grid in grids]
        pairs = [(v, q) for v in range(len(global_view_features)) for q in range(len(views))]
        pairs = [(v, q) for v, q in pairs if v != q]
        # Random points are no crop, so the nearest point is found as the nearest feature.
        place = [self._matches(points, pairs, back) for back in (False, True)]
        alike = [self._matches(tokens, pairs, back) for back in (False, True)]
        return self.loss([whole for whole, _ in views], tokens, place, alike, pairs=pairs).loss

    def _matches(self, values: list[Tensor], pairs: list[tuple[int, int]], back: bool) -> Any:
        found = {}
        for v, q in ((q, v) if back else (v, q) for v, q in pairs):
            count = min(self.num_matches[back], values[v].shape[1])
            matcher = KeepBest(SimilarityMatcher("l2"), count=count)
            found[v, q] = matcher(Tokens(values[v]), Tokens(values[q])).compact(count)
        return found

    def _global_loss(
        self,
        global_view_features: Sequence[tuple[Tensor, Tensor]],
        local_view_features: Sequence[tuple[Tensor, Tensor]],
    ) -> Tensor:
        wholes = [whole for whole, _ in (*global_view_features, *local_view_features)]
        views = range(len(wholes))
        pairs = [(v, q) for v in range(len(global_view_features)) for q in views if v != q]
        return self.loss.global_loss(wholes, pairs=pairs)


class LightlyDINOLoss(nn.Module):
    """`GlobalDistillationLoss` with `Centering`."""

    def __init__(
        self,
        output_dim: int = 65536,
        teacher_temp: float = 0.04,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        _used()
        self.teacher_temp = teacher_temp
        targets = Centering(output_dim, center_momentum)
        self.loss = GlobalDistillationLoss(targets, student_temp=student_temp)

    @property
    def center(self) -> Tensor:
        return self.loss.targets.center[None, None]

    def update_center(self, teacher_out: Tensor) -> None:
        self.loss.targets.update([teacher_out])

    def forward(
        self,
        teacher_out: list[Tensor],
        student_out: list[Tensor],
        teacher_temp: float | None = None,
    ) -> Tensor:
        temp = self.teacher_temp if teacher_temp is None else float(teacher_temp)
        return self.loss(student_out, teacher_out, teacher_temp=temp)


class LightlyCenter(nn.Module):
    """`Centering` of the last axis."""

    def __init__(self, size: tuple[int, ...], mode: str = "mean", momentum: float = 0.9) -> None:
        super().__init__()
        if mode != "mean":
            raise ValueError(f"mode {mode!r} is not 'mean'")
        _used()
        self.size, self.targets = size, Centering(size[-1], momentum)

    @property
    def value(self) -> Tensor:
        return self.targets.center.view(self.size)

    def update(self, x: Tensor) -> None:
        self.targets.update([x.reshape(-1, x.shape[-1])])


class LightlyIBOTPatchLoss(nn.Module):
    """`MaskedDistillationLoss`: the masked tokens' logits are put back at their places."""

    def __init__(
        self,
        output_dim: int = 65536,
        teacher_temp: float = 0.04,
        student_temp: float = 0.1,
        center_mode: str = "mean",
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        _used()
        self.teacher_temp = teacher_temp
        self.center = LightlyCenter((1, output_dim), center_mode, center_momentum)
        self.loss = MaskedDistillationLoss(self.center.targets, student_temp=student_temp)

    def forward(
        self,
        teacher_out: Tensor,
        student_out: Tensor,
        mask: Tensor,
        teacher_temp: float | None = None,
    ) -> Tensor:
        masked = mask.flatten(1)
        student, teacher = (
            values.new_zeros(*masked.shape, values.shape[-1]).masked_scatter(
                masked[..., None], values
            )
            for values in (student_out, teacher_out)
        )
        temp = self.teacher_temp if teacher_temp is None else teacher_temp
        return self.loss([student], [teacher], [masked], teacher_temp=temp, teacher_valid=[masked])


class LightlyKoLeoLoss(nn.Module):
    """`KoLeoLoss`."""

    def __init__(self, p: float = 2, eps: float = 1e-8) -> None:
        super().__init__()
        _used()
        self.loss = KoLeoLoss(eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(x)


SWAPS: dict[str, dict[str, Any]] = {
    "kornia.feature.matching": {"match_nn": match_nn, "match_mnn": match_mnn},
    "lightly.models.utils": {
        "most_similar_index": most_similar_index,
        "select_most_similar": select_most_similar,
        "nearest_neighbors": nearest_neighbors,
    },
    "lightly.models.modules.center": {"Center": LightlyCenter},
    "lightly.loss.ibot_loss": {"IBOTPatchLoss": LightlyIBOTPatchLoss},
    "lightly.loss.koleo_loss": {"KoLeoLoss": LightlyKoLeoLoss},
    "lightly.loss": {
        "DINOLoss": LightlyDINOLoss,
        "VICRegLoss": LightlyVICRegLoss,
        "VICRegLLoss": LightlyVICRegLLoss,
    },
}
"""Their module: their name → what stands in for it."""


def pytest_configure(config: pytest.Config) -> None:
    wanted = os.environ.get("SWAP_LIBRARY", "kornia lightly").split()
    for module, names in SWAPS.items():
        package = module.partition(".")[0]
        if package not in wanted or importlib.util.find_spec(package) is None:
            continue
        theirs = importlib.import_module(module)
        for name, ours in names.items():
            if not hasattr(theirs, name):
                raise pytest.UsageError(f"{module} has no {name} to swap")
            setattr(theirs, name, ours)


def pytest_runtest_setup(item: pytest.Item) -> None:
    _ran[0] = 0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    record = os.environ.get("SWAP_RECORD")
    if record and (report.when == "call" or (report.when == "setup" and not report.passed)):
        error = "" if call.excinfo is None else call.excinfo.exconly().strip()[:300]
        line = {"test": item.nodeid, "outcome": report.outcome, "ran": _ran[0], "error": error}
        with Path(record).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")
    return report
