import copy
import io
import pickle

import pytest
import torch
from helpers.strategies import matches_for, random_geometry
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, default_collate

from local_distill import (
    ConfigError,
    CropGeometry,
    Matches,
    ShapeError,
    TeacherTargets,
    TokenGrid,
    Tokens,
    ViewOutput,
    from_box,
)


@given(st.data(), st.integers(2, 3), st.integers(1, 7), st.integers(1, 9))
def test_gather_is_the_weighted_sum(data, b, s, t):
    matches = data.draw(matches_for(b, s, t))
    values = torch.randn(b, t, 3, dtype=torch.float64)
    found = matches.gather(values)
    assert found.dtype == torch.float64
    for i in range(b):
        for token in range(s):
            total = [0.0] * 3
            for k in range(matches.weight.shape[2]):
                row = values[i, int(matches.teacher_index[i, token, k])]
                for d in range(3):
                    total[d] += float(matches.weight[i, token, k]) * float(row[d])
            assert found[i, token].tolist() == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_gather_never_reads_rows_without_weight(k):
    index = torch.zeros(2, 4, k, dtype=torch.int64)
    index[..., 0] = 1
    weight = torch.zeros(2, 4, k)
    weight[:, :2, 0] = 1.0
    values = torch.full((2, 2, 3), torch.nan)
    values[:, 1] = 5.0
    values.requires_grad_()
    found = Matches(index, weight, torch.zeros(2, 4)).gather(values)
    assert found[:, :2].eq(5).all()
    assert found[:, 2:].eq(0).all()
    found.sum().backward()
    assert torch.equal(values.grad, torch.tensor([[[0.0] * 3, [2.0] * 3]] * 2))


@pytest.mark.parametrize("k", [2, 6])
def test_gather_has_exact_gradients(k):
    g = torch.Generator().manual_seed(0)
    index = torch.randint(0, 5, (2, 4, k), generator=g)
    weight = torch.rand(2, 4, k, generator=g, dtype=torch.float64) / k
    matches = Matches(index, weight, torch.zeros(2, 4))
    values = torch.randn(2, 5, 3, generator=g, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(matches.gather, (values,))


def test_gather_computes_half_precision_in_float32_under_autocast():
    index = torch.arange(6).expand(2, 4, 6)  # dense: a product, which autocast would round
    weight = torch.full((2, 4, 6), 1 / 6)
    values = torch.rand(2, 6, 3) + 100
    matches = Matches(index, weight, torch.zeros(2, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = matches.gather(values)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, values.mean(1, keepdim=True).expand(2, 4, 3))
    assert matches.gather(values.half()).dtype == torch.float32


def test_gather_refuses_other_batches():
    matches = Matches.identity(torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ShapeError, match=r"axis `b` is 2 in `matches\.weight` but 1 in `values`"):
        matches.gather(torch.zeros(1, 3, 4))


@given(st.data(), st.integers(2, 3), st.integers(1, 7), st.integers(1, 5))
def test_compact_keeps_the_best(data, b, s, t):
    matches = data.draw(matches_for(b, s, t))
    n = data.draw(st.integers(0, s))
    index, kept = matches.compact(n)
    assert index.shape == (b, n)
    for i in range(b):
        order = sorted(range(s), key=lambda token: (float(matches.cost[i, token]), token))
        assert index[i].tolist() == order[:n]
        for place, token in enumerate(order[:n]):
            assert torch.equal(kept.teacher_index[i, place], matches.teacher_index[i, token])
            assert torch.equal(kept.weight[i, place], matches.weight[i, token])
            assert kept.cost[i, place] == matches.cost[i, token]
    with pytest.raises(ShapeError, match=r"\[0, s\]"):
        matches.compact(s + 1)


def test_identity():
    valid = torch.tensor([[True, False, True], [False, False, True]])
    matches = Matches.identity(valid)
    assert torch.equal(matches.matched, valid)
    assert torch.equal(matches.mass, valid.float())
    assert torch.equal(matches.cost.isfinite(), valid)
    values = torch.randn(2, 3, 4)
    torch.testing.assert_close(matches.gather(values), values * valid[..., None])


@pytest.mark.parametrize("view_size", [(32, 48), (7, 5), (1, 1)])
def test_tiling_covers_the_view(view_size):
    grid = TokenGrid.tiling(3, 5, view_size)
    assert grid.num_tokens == 15
    assert grid.offset[0] - grid.stride[0] / 2 == pytest.approx(0)
    assert grid.offset[1] + grid.stride[1] * 2.5 == pytest.approx(view_size[0])
    assert grid.offset[0] + grid.stride[0] * 4.5 == pytest.approx(view_size[1])


def test_tiling_refuses_nonsense():
    with pytest.raises(ConfigError, match="rows"):
        TokenGrid.tiling(0, 3, (8, 8))
    with pytest.raises(ConfigError, match="view_size"):
        TokenGrid.tiling(2, 3, (8, -8))
    with pytest.raises(
        ShapeError, match=r"`view_size` must be a pair \(height, width\), got 48; .*\(48, 48\)"
    ):
        TokenGrid.tiling(3, 5, 48)
    for sizes in ((48,), (3, 24, 40), "48", None, torch.tensor(48)):
        with pytest.raises(ShapeError, match="`view_size` must be a pair"):
            TokenGrid.tiling(3, 5, sizes)
    wanted = TokenGrid.tiling(3, 5, (24, 40))
    for sizes in ([24, 40], torch.Size([24, 40]), torch.tensor([24, 40])):
        assert TokenGrid.tiling(3, 5, sizes) == wanted


def test_probs_are_of_the_float64_formula():
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 3, 5, generator=g) * 100
    offset = torch.randn(5, generator=g)
    truth = (logits.double() / 0.04 + offset.double()).softmax(-1)
    found = TeacherTargets(logits, offset, 0.04).probs()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth, atol=1e-4, rtol=1e-3)
    exact = TeacherTargets(logits.double(), offset.double(), 0.04).probs()
    torch.testing.assert_close(exact, truth)
    assert TeacherTargets(logits.half(), None, 0.04).probs().dtype == torch.float32


class Samples(Dataset):
    """Per-sample geometries, as a data set of views gives them."""

    def __len__(self):
        return 5

    def __getitem__(self, i):
        views = [from_box((i, j, i + 10, j + 12), (8, 6), (40, 50)) for j in range(2)]
        return [torch.full((3, 8, 6), float(i))] * 2, views


@pytest.mark.parametrize("workers", [0, 2])
def test_geometry_survives_the_loader(workers):
    loader = DataLoader(Samples(), batch_size=3, num_workers=workers)
    seen = 0
    for views, geometries in loader:
        assert len(views) == len(geometries) == 2
        for j, geometry in enumerate(geometries):
            assert isinstance(geometry, CropGeometry)
            for row in range(geometry.matrix.shape[0]):
                truth = Samples()[seen + row][1][j]
                assert all(torch.equal(a[row], b) for a, b in zip(geometry, truth, strict=True))
        seen += views[0].shape[0]
    assert seen == 5


def test_geometry_survives_pinning(monkeypatch):
    # There may be no device to pin for: the walk over the structure is what is ours.
    from torch.utils.data._utils.pin_memory import pin_memory

    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t, *_: pinned.append(t) or t)
    batch = default_collate([Samples()[0], Samples()[1]])
    again = pin_memory(batch)
    assert isinstance(again[1][0], CropGeometry)
    assert len(pinned) == 2 + 2 * 3


def test_geometry_goes_to_a_device_whole():
    moved = random_geometry().to("meta")
    assert isinstance(moved, CropGeometry)
    assert [part.device.type for part in moved] == ["meta"] * 3
    assert moved.view_size.dtype == torch.int32


def structures():
    geometry = random_geometry()
    grid = TokenGrid.tiling(2, 3, (24, 40))
    tokens = Tokens(torch.randn(2, 6, 4), geometry, grid)
    return [
        geometry,
        grid,
        tokens,
        Matches.identity(torch.ones(2, 6, dtype=torch.bool)),
        ViewOutput(torch.randn(2, 5), None, tokens),
        TeacherTargets(torch.randn(2, 5), torch.zeros(5), 0.04),
    ]


def leaves(structure):
    return torch.utils._pytree.tree_leaves(structure)


def same(a, b):
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(leaves(a), leaves(b), strict=True)
    )


@pytest.mark.parametrize("structure", structures(), ids=lambda s: type(s).__name__)
def test_structures_pickle_copy_and_load_safely(structure):
    again = pickle.loads(pickle.dumps(structure))
    assert type(again) is type(structure)
    assert same(again, structure)
    assert same(copy.deepcopy(structure), structure)
    buffer = io.BytesIO()
    torch.save(structure, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert type(loaded) is type(structure)
    assert same(loaded, structure)


def test_geometry_through_fabric():
    fabric_module = pytest.importorskip("lightning_fabric", reason="needs the extra `train`")
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    loader = fabric.setup_dataloaders(DataLoader(Samples(), batch_size=2))
    _, geometries = next(iter(loader))
    assert isinstance(geometries[0], CropGeometry)
    assert geometries[0].matrix.dtype == torch.float32
    assert torch.equal(geometries[0].matrix[1], Samples()[1][1][0].matrix)


def test_tokens_without_anything_have_no_number():
    with pytest.raises(ShapeError, match="neither"):
        Tokens().num_tokens  # noqa: B018
