"""Each Triton kernel beside its plain form, on small inputs, before a device is trusted with it."""

from __future__ import annotations

import torch
from torch import Tensor

from local_distill.kernels.most_similar import _most_similar
from local_distill.kernels.paired_cross_entropy import AnsweredView, _walk
from local_distill.kernels.triton_cross_entropy import cross_entropy_by_rows
from local_distill.kernels.triton_lattice import LatticePair, lattice_matches
from local_distill.kernels.triton_most_similar import most_similar_by_tiles
from local_distill.structures import Matches, TeacherTargets, TokenGrid

__all__ = ["check_kernels"]

# Odd ones, longer than a kernel's step over columns or tokens.
_TOKENS, _TEACHER_TOKENS, _PROTOTYPES, _FEATURES = (9, 17), 71, 4_111, 37


def check_kernels(device: torch.device) -> None:
    """Raise where a kernel's results on this device are not those of its plain form.

    It compiles the kernels for the dtypes that training uses, once a process, and waits for the
    device.
    """
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        _check_losses(device, dtype, generator)
        _check_similarities(device, dtype, generator)
    _check_lattice(device, generator)


def _check_losses(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> None:
    def drawn(*shape: int) -> Tensor:
        return (3 * torch.randn(*shape, generator=generator)).to(device, dtype)

    offset = drawn(_PROTOTYPES).float()
    targets = {0: TeacherTargets(drawn(2, _TEACHER_TOKENS, _PROTOTYPES), offset, 0.3)}
    views = []
    for tokens in _TOKENS:
        index = torch.randint(0, _TEACHER_TOKENS, (2, tokens, 2), generator=generator)
        weight = torch.rand(2, tokens, 2, generator=generator) / 2
        weight[:, 0] = 0.0
        matches = Matches(index.to(device), weight.to(device), weight[..., 0].to(device))
        scale = torch.ones(2, device=device)
        views.append(AnsweredView(drawn(2, tokens, _PROTOTYPES), [(0, matches, scale)]))
    results = []
    for form in (cross_entropy_by_rows, _walk):
        slopes = [torch.empty_like(view.logits) for view in views]
        loss = form(views, targets, 0.2, slopes, None)
        results.append((loss.reshape(1), *slopes))
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for name, found, wanted in zip(("loss", "slope", "slope"), *results, strict=True):
        _ensure_close(f"{name} of {dtype} logits", found, wanted, tolerance)


def _check_similarities(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> None:
    def drawn(tokens: int) -> Tensor:
        return torch.randn(2, tokens, _FEATURES, generator=generator).to(device, dtype)

    students = dict(enumerate(drawn(tokens) for tokens in _TOKENS))
    teachers = {0: drawn(_TEACHER_TOKENS)}
    valid = {0: torch.arange(_TEACHER_TOKENS, device=device).expand(2, -1) % 7 != 3}
    pairs = [(v, 0) for v in students]
    found = most_similar_by_tiles(students, teachers, valid, pairs)
    wanted = _most_similar(students, teachers, valid, pairs, "cosine", torch.float32)
    units = torch.nn.functional.normalize(teachers[0].float(), dim=-1)
    for pair in pairs:
        # Near-tied tokens may be told apart by rounding: what counts is how similar they are.
        ours, theirs = (
            _similarity(students[pair[0]].float(), units, best[pair].teacher_index)
            for best in (found, wanted)
        )
        _ensure_close(f"similarity of {dtype} features", ours, theirs, 1e-4)


def _similarity(features: Tensor, units: Tensor, index: Tensor) -> Tensor:
    """(b, s) product of each student token with what was chosen for it."""
    chosen = units.gather(1, index[..., None].expand(-1, -1, units.shape[-1]))
    return (features * chosen).sum(-1)


def _check_lattice(device: torch.device, generator: torch.Generator) -> None:
    sides = 20 + 60 * torch.rand(2, 2, 2, generator=generator, dtype=torch.float64)
    low = 10 * torch.rand(2, 2, 2, generator=generator, dtype=torch.float64)
    matrix = torch.zeros(2, 2, 3, 3, dtype=torch.float64)
    matrix[..., 0, 0], matrix[..., 1, 1], matrix[..., 2, 2] = sides[..., 0], sides[..., 1], 1
    matrix[..., :2, 2] = low
    matrix[1, :, 0, 2] += sides[1, :, 0]  # the second view is mirrored
    matrix[1, :, 0, 0] *= -1
    size = torch.full((2, 2, 2), 100, dtype=torch.int32)
    grids = [TokenGrid.tiling(4, 7, (1, 1)), TokenGrid.tiling(5, 3, (1, 1))]
    pair = LatticePair(0, 1, grids[0], grids[1])
    index, weight, _ = lattice_matches(
        matrix.to(device), size.to(device), [pair], torch.inf, torch.float32
    )
    places = [_centers(one, grid) for one, grid in zip(matrix, grids, strict=True)]
    squared = (places[0][:, :, None] - places[1][:, None]).square().sum(-1)
    reached = squared.gather(2, index.cpu().view(2, -1, 1))[..., 0]
    _ensure_close("squared distance of the lattice", reached, squared.amin(-1), 1e-9)
    if not bool((weight == 1).all()):
        raise AssertionError("the lattice leaves out tokens that lie inside the source")


def _centers(matrix: Tensor, grid: TokenGrid) -> Tensor:
    """(b, n, 2) in the source."""
    x = grid.offset[0] + grid.stride[0] * torch.arange(grid.cols, dtype=matrix.dtype)
    y = grid.offset[1] + grid.stride[1] * torch.arange(grid.rows, dtype=matrix.dtype)
    points = torch.stack((x.repeat(grid.rows), y.repeat_interleave(grid.cols)), -1)
    return points @ matrix[:, :2, :2].mT + matrix[:, None, :2, 2]


def _ensure_close(what: str, found: Tensor, wanted: Tensor, tolerance: float) -> None:
    largest = wanted.abs().max().double()
    error = float(((found.double() - wanted.double()).abs().max() / largest).cpu())
    if not error <= tolerance:  # NaN too
        raise AssertionError(f"{what} differs from the plain form by {error:.2g} of the largest")
