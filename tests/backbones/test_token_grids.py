"""The grids of formulas against those measured from input gradients."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from local_distill._token_grids import Step, grid_of_steps, known_steps
from local_distill.backbones import TimmBackbone, measure_token_grid, tiny_vit
from local_distill.errors import ConfigError, ShapeError
from local_distill.structures import TokenGrid

torch.set_num_threads(1)


def farthest(measured: TokenGrid, true: TokenGrid) -> float:
    """Largest distance of a token's measured centre from the true one along an axis, in pixels."""
    assert (measured.rows, measured.cols) == (true.rows, true.cols)
    return max(
        abs(measured.offset[a] + i * measured.stride[a] - true.offset[a] - i * true.stride[a])
        for a, count in ((0, true.cols), (1, true.rows))
        for i in range(count)
    )


@pytest.mark.parametrize(
    ("name", "options", "view_size", "tolerance"),
    [
        ("vit_tiny_patch16_224", {"depth": 2, "embed_dim": 48}, (96, 160), 0.1),
        ("vit_tiny_patch16_224", {"depth": 2, "embed_dim": 48}, (100, 165), 0.1),
        (
            "vit_small_patch14_dinov2",
            {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 224},
            (96, 96),
            0.1,
        ),
        (
            "swin_tiny_patch4_window7_224",
            {"embed_dim": 24, "depths": (1, 1, 2, 1)},
            (96, 160),
            0.25,
        ),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": (1, 1, 2, 1)}, (165, 100), 1),
        ("swinv2_tiny_window8_256", {"embed_dim": 24, "depths": (1, 1, 1, 1)}, (192, 256), 1),
        ("convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48)}, (96, 160), 0.25),
        ("convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48)}, (165, 100), 0.25),
        ("convnext_atto_ols", {}, (160, 192), 0.25),
        ("resnet18", {}, (96, 96), 0.5),
        ("resnet18", {}, (192, 224), 0.25),
    ],
)
def test_formula_agrees_with_measurement(name, options, view_size, tolerance) -> None:
    torch.manual_seed(0)
    backbone = TimmBackbone(name, **options)
    assert backbone._steps is not None
    measured = measure_token_grid(backbone, view_size, networks=4)
    assert farthest(measured, backbone.token_grid(view_size)) < tolerance


def test_demo_model_at_both_of_its_sizes() -> None:
    backbone = tiny_vit()
    for size in (48, 24):
        measured = measure_token_grid(backbone, (size, size))
        assert farthest(measured, backbone.token_grid((size, size))) < 0.1


def test_measurement_is_repeatable_and_forgets_what_was_learned() -> None:
    torch.manual_seed(0)
    backbone = TimmBackbone("resnet18").train()
    state = {key: value.clone() for key, value in backbone.state_dict().items()}
    random_state = torch.get_rng_state()
    first = measure_token_grid(backbone, (96, 160), networks=2)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert backbone.training
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, state[key])
    with torch.no_grad():
        for weight in backbone.parameters():
            weight.mul_(3.0).add_(0.2)
    with torch.inference_mode():
        assert measure_token_grid(backbone, (96, 160), networks=2) == first


def test_paths_that_disagree_have_no_formula() -> None:
    # ResNet-D's averaging shortcut is centred 14 px beside its convolutions.
    torch.manual_seed(0)
    backbone = TimmBackbone("resnet18d")
    assert backbone._steps is None
    grid = measure_token_grid(backbone, (160, 160))
    assert all(abs(stride - 32) < 0.5 for stride in grid.stride)
    assert all(abs(offset - 14.5) < 0.5 for offset in grid.offset)


class _Conv(nn.Module):
    """Patch tokens of one convolution."""

    def __init__(self, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, kernel, stride, padding)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images).flatten(2).transpose(1, 2)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(7, 4, 3), (4, 4, 0), (8, 4, 2), (9, 8, 1), (3, 5, 0)]
)
def test_one_convolution_is_measured_where_its_arithmetic_says(kernel, stride, padding) -> None:
    view_size = (40, 64)
    true = grid_of_steps([Step((kernel,) * 2, (stride,) * 2, (padding,) * 2)], view_size)
    module = _Conv(kernel, stride, padding)
    measured = measure_token_grid(module, view_size, shape=(true.rows, true.cols))
    assert farthest(measured, true) < 0.1


def test_a_valley_narrower_than_a_pixel_is_found() -> None:
    # Its misfit is least at 0.5 + 32i, and has another valley at 8.5 + 30i, far from any edge.
    torch.manual_seed(0)
    measured = measure_token_grid(TimmBackbone("ghostnet_100"), (33, 259), shape=(2, 9), networks=2)
    assert abs(measured.offset[0] - 0.5) < 0.5
    assert abs(measured.stride[0] - 32) < 0.1


def test_two_and_three_tokens_are_found_to_half_a_pixel() -> None:
    measured = measure_token_grid(_Conv(16, 16, 0), (32, 48))
    assert farthest(measured, TokenGrid.tiling(2, 3, (32, 48))) < 0.5


def test_one_token() -> None:
    grid = measure_token_grid(_Conv(16, 16, 0), (16, 16))
    assert (grid.rows, grid.cols, grid.stride) == (1, 1, (16.0, 16.0))
    assert all(abs(offset - 8) < 0.5 for offset in grid.offset)


@pytest.fixture(scope="module")
def script():
    """benchmarks/token_grids.py, whose averages know nothing of formulas and fits."""
    path = Path(__file__).parents[2] / "benchmarks" / "token_grids.py"
    spec = importlib.util.spec_from_file_location("token_grids_script", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("view_size", [(64, 96), (35, 66)])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_small_patch14_reg4_dinov2", {"depth": 2, "embed_dim": 48, "num_heads": 3}),
        ("vit_small_patch16_dinov3", {"depth": 2, "embed_dim": 48, "num_heads": 3}),
        ("swinv2_tiny_window8_256", {"embed_dim": 24, "depths": (1, 1, 1, 1)}),
        ("convnext_atto_ols", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
        ("resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)}),
        ("regnetx_002", {}),
        ("test_efficientnet", {}),
        ("mobilenetv3_small_050", {}),
        ("tf_mobilenetv3_small_minimal_100", {}),
        ("mobilenetv4_conv_small_050", {}),
        ("pvt_v2_b0", {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 40, 64)}),
    ],
)
def test_formula_is_the_centroid_of_the_averaging_network(script, name, options, view_size) -> None:
    torch.manual_seed(0)
    backbone = TimmBackbone(name, **options).eval()
    assert backbone._steps is not None
    exact = script.grid_by_averages(backbone, view_size)
    assert farthest(exact, backbone.token_grid(view_size)) < 1e-4


def test_the_averaging_network_sees_where_paths_disagree(script) -> None:
    # By its convolutions 0.5, by its shortcuts 14.5: in between, and no formula says where.
    y, stride = script.centroids(TimmBackbone("resnet18d").eval(), (32, 32), 0)
    assert abs(stride - 32) < 1e-4
    assert 2 < y < 13


@pytest.mark.parametrize(
    "name",
    [
        "skresnet18",  # two strided convolutions side by side
        "resnetblur18",
        "res2net50_14w_8s",
        "mixnet_s",  # kernels of several sizes side by side
        "efficientnet_blur_b0",
        "mobilenetv4_hybrid_medium",
    ],
)
def test_branches_and_blurs_within_known_families_have_no_formula(name: str) -> None:
    with torch.device("meta"):
        assert known_steps(timm.create_model(name)) is None


def test_layers_that_may_pad_in_their_forward_pass_have_no_formula() -> None:
    class Padding(nn.Conv2d):
        pass

    backbone = TimmBackbone("resnet18").model
    assert known_steps(backbone) is not None
    backbone.conv1 = Padding(3, 64, 7, 2, 3)
    assert known_steps(backbone) is None


@pytest.mark.parametrize("size", range(5, 40, 3))
def test_tensorflows_padding_against_its_own_convolutions(size: int) -> None:
    # Which pixels reach the first output: seen by gradient, where no padding hides them.
    kernels = [(3, 2), (5, 2), (2, 2)]
    layers = nn.Sequential(*(Conv2dSame(1, 1, k, s, bias=False) for k, s in kernels)).double()
    for layer in layers:
        nn.init.ones_(layer.weight)
    grid = grid_of_steps([Step((k, k), (s, s), same=True) for k, s in kernels], (size, size + 32))
    # 32 px more leave the padding as it is, and tokens in the middle that see none of it.
    images = torch.zeros(1, 1, size, size + 32, dtype=torch.float64, requires_grad=True)
    out = layers(images)
    assert tuple(out.shape[2:]) == (grid.rows, grid.cols)
    (gradient,) = torch.autograd.grad(out[0, 0, :, 3].sum(), images)
    seen = gradient.sum((0, 1, 2))
    center = float((seen * (torch.arange(size + 32) + 0.5)).sum() / seen.sum())
    assert grid.offset[0] + 3 * grid.stride[0] == pytest.approx(center)


@pytest.mark.parametrize("size", range(9, 30, 4))
def test_composed_steps_against_chasing_pixels(size: int) -> None:
    chain = [
        Step((3, 3), (2, 2), (1, 1)),
        Step((2, 2), (2, 2)),
        Step((2, 2), (2, 2), ceil=True),
    ]
    # Oracle: which pixels reach output i, found one layer at a time; its centre is their middle,
    # missing ones (padding) counted as if the image went on.
    spans = [(float(i), float(i + 1)) for i in range(size)]
    first, pitch = spans[0], 1.0
    count = size
    for step in chain:
        kernel, stride, pad = step.kernel[0], step.stride[0], step.padding[0]
        padded = count + 2 * pad
        if step.ceil:
            padded += (-(padded - kernel)) % stride
        starts = list(itertools.takewhile(lambda s: s + kernel <= padded, range(0, 99, stride)))  # noqa: B023
        low = first[0] - pad * pitch
        first = (low, first[1] + (kernel - 1 - pad) * pitch)
        pitch *= stride
        count = len(starts)
    grid = grid_of_steps(chain, (size, size + 8))
    assert (grid.rows, grid.stride[1], grid.offset[1]) == (count, pitch, sum(first) / 2)


def test_what_cannot_be_measured_is_refused() -> None:
    class Blind(_Conv):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images * 0.0)

    with pytest.raises(ConfigError, match="do not depend"):
        measure_token_grid(Blind(4, 4, 0), (16, 16))
    with pytest.raises(ShapeError, match="patch_tokens"):
        measure_token_grid(nn.Conv2d(3, 4, 4), (16, 16))
    with pytest.raises(ShapeError, match="3 × 3"):
        measure_token_grid(_Conv(4, 4, 0), (16, 16), shape=(3, 3))
    with pytest.raises(ConfigError, match="networks"):
        measure_token_grid(_Conv(4, 4, 0), (16, 16), networks=0)
