"""What Hugging Face processors make of ramps against the geometry read from their settings."""

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from local_distill import ConfigError, GeometryError
from local_distill.transforms.adapters import from_hf_processor

EXACT = 2e-3  # source px, where a bilinear resize makes larger
FILTER = 0.12  # source px, where one makes smaller, or is bicubic
STEPS = 4  # the PIL back end takes uint8: grey values to a pixel
QUANTISED = FILTER + 1.0 / STEPS

sides = st.integers(20, 60)
edges = st.integers(18, 80)
PLAIN = {"do_rescale": False, "do_normalize": False, "do_convert_rgb": False}

SIZES = st.one_of(
    st.builds(lambda h, w: {"height": h, "width": w}, edges, edges),
    st.builds(lambda edge: {"shortest_edge": edge}, edges),
    st.builds(
        lambda edge, more: {"shortest_edge": edge, "longest_edge": edge + more}, edges, sides
    ),
    st.builds(lambda h, w: {"max_height": h, "max_width": w}, edges, edges),
)
PLAIN_CLASSES = ["Bit", "Blip", "CLIP", "DeiT", "MobileNetV1", "Pvt", "Siglip", "ViT"]


def make(name, backend, **settings):
    kind = getattr(transformers, f"{name}ImageProcessor{'Pil' if backend == 'pil' else ''}")
    return kind(**{**PLAIN, **settings})


def error(processor, shape, ramps, agreement, margin=None):
    """Through the processor itself; PIL takes whole grey values only."""
    quantised = processor.backend == "pil"
    image = ramps(*shape).float()
    if quantised:
        image = ((image - 0.5).mul(STEPS) + 0.5).round().to(torch.uint8)
        image[2] = 1 * 200  # ones, where padding is 0
        values = processor(np.ascontiguousarray(image.numpy()), input_data_format="channels_first")
    else:
        values = processor(image, input_data_format="channels_first")
    view = torch.as_tensor(np.asarray(values["pixel_values"][0])).double()
    if quantised:
        view = torch.stack([view[0] / STEPS + 0.5, view[1] / STEPS + 0.5, view[2] / 200])
    geometry = from_hf_processor(processor, shape, tuple(view.shape[-2:]))
    return agreement(view, geometry, margin)


backends = pytest.mark.parametrize("backend", ["torchvision", "pil"])


@backends
@pytest.mark.parametrize("name", PLAIN_CLASSES)
def test_every_plain_processor_agrees_with_its_pixels(name, backend, ramps, agreement):
    compared = 0

    @given(
        size=SIZES,
        crop=st.one_of(st.none(), st.tuples(edges, edges)),
        height=sides,
        width=sides,
    )
    def holds(size, crop, height, width):
        nonlocal compared
        settings = {"size": size, "do_resize": True, "do_center_crop": False, "resample": 2}
        if crop is not None:
            cropped = {"height": crop[0], "width": crop[1]}
            settings |= {"do_center_crop": True, "crop_size": cropped}
        processor = make(name, backend, **settings)
        found = error(processor, (height, width), ramps, agreement)
        assert found.error < (QUANTISED if backend == "pil" else FILTER)
        compared += found.pixels

    holds()
    assert compared > 1000


@given(height=sides, width=sides, size=st.integers(60, 90), crop=edges)
def test_torchvision_is_exact_where_nothing_is_filtered(
    height, width, size, crop, ramps, agreement
):
    processor = make("Bit", "torchvision", size={"shortest_edge": size}, crop_size=crop, resample=2)
    assert error(processor, (height, width), ramps, agreement).error < EXACT


@backends
@given(height=sides, width=sides, crop=st.tuples(edges, edges))
def test_a_crop_alone_is_exact(backend, height, width, crop, ramps, agreement):
    """Crops smaller than the image and larger: the back ends pad differently."""
    cropped = {"height": crop[0], "width": crop[1]}
    processor = make("CLIP", backend, do_resize=False, crop_size=cropped)
    found = error(processor, (height, width), ramps, agreement, margin=1)
    # x + 0.5 has no half grey value: rounding adds up to half of one
    assert found.error <= (0.5 / STEPS if backend == "pil" else 0)
    assert found.pixels


@backends
@given(height=sides, width=sides, edge=st.sampled_from([30, 64, 96, 384]), pct=st.floats(0.6, 1.0))
def test_convnext_crops_in_its_resize(backend, height, width, edge, pct, ramps, agreement):
    size = {"shortest_edge": edge}
    processor = make("ConvNext", backend, size=size, crop_pct=pct, resample=2)
    found = error(processor, (height, width), ramps, agreement)
    assert found.error < QUANTISED if backend == "pil" else found.error < FILTER


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *(("Beit", "torchvision"), ("Beit", "pil"), ("DINOv3ViT", "torchvision")),
        *(("Levit", "torchvision"), ("Levit", "pil")),
    ],
)
@given(height=sides, width=sides, size=SIZES)
def test_processors_with_methods_of_their_own(name, backend, height, width, size, ramps, agreement):
    if name == "Levit":
        size = {"shortest_edge": 61}
    crop = {"do_center_crop": True, "crop_size": {"height": 33, "width": 28}}
    processor = make(name, backend, size=size, resample=2, **crop)
    found = error(processor, (height, width), ramps, agreement)
    assert found.error < (QUANTISED if backend == "pil" else FILTER)


@backends
def test_padding_to_the_batchs_largest_moves_nothing(backend, ramps, agreement):
    small, large = ramps(20, 31), ramps(45, 27)
    processor = make(
        *("ViT", backend), do_resize=False, do_pad=True, return_tensors="pt", do_rescale=False
    )
    images = [image.round().to(torch.uint8).numpy() for image in (small, large)]
    values = processor(images, input_data_format="channels_first", return_tensors="pt")
    batch = values["pixel_values"]
    assert batch.shape[-2:] == (45, 31)
    for image, view in zip(images, batch, strict=True):
        height, width = image.shape[-2:]
        geometry = from_hf_processor(processor, (height, width), (45, 31))
        torch.testing.assert_close(geometry.matrix, torch.eye(3), rtol=0, atol=0)
        assert (view[:, :height, :width].numpy() == image).all()


@backends
def test_defaults_of_published_models(backend):
    """DINOv2: 256 on the shorter side, 224 from the middle; ViT: squashed to a square."""
    dinov2 = make("Bit", backend, size={"shortest_edge": 256}, crop_size=224)
    matrix = from_hf_processor(dinov2, (480, 640), (224, 224)).matrix
    left = (341 - 224) // 2  # HF rounds 341.33 down
    expected = torch.tensor([[640 / 341, 0, left * 640 / 341], [0, 480 / 256, 16 * 480 / 256]])
    torch.testing.assert_close(matrix[:2], expected)
    vit = make("ViT", backend)
    matrix = from_hf_processor(vit, (480, 640), (224, 224)).matrix
    torch.testing.assert_close(matrix.diagonal(), torch.tensor([640 / 224, 480 / 224, 1]))


def test_the_two_back_ends_pad_an_odd_pixel_apart():
    settings = {"do_resize": False, "crop_size": {"height": 27, "width": 25}}
    shift = [
        from_hf_processor(make("CLIP", backend, **settings), (20, 20), (27, 25)).matrix[:2, 2]
        for backend in ("torchvision", "pil")
    ]
    torch.testing.assert_close(shift[0] - shift[1], torch.tensor([1.0, 1.0]))


@pytest.mark.parametrize(
    "name", ["Donut", "Pix2Struct", "LlavaNext", "Idefics2", "Qwen2VL", "LayoutLMv2", "Sam", "Vilt"]
)
@backends
def test_processors_that_tile_turn_or_pad_are_refused_by_name(name, backend):
    processor = make(name, backend)
    with pytest.raises(ConfigError, match=f"cannot read {type(processor).__name__}"):
        from_hf_processor(processor, (40, 60), (30, 30))


def test_a_class_of_ones_own_is_refused_where_it_moves_pixels():
    class Squeezed(transformers.ViTImageProcessor):
        def resize(self, image, size, resample=None, **settings):
            return super().resize(image[..., 5:], size, resample, **settings)

    with pytest.raises(ConfigError, match="Squeezed: it has a `resize` of its own"):
        from_hf_processor(Squeezed(), (40, 60), (224, 224))

    class Named(transformers.ViTImageProcessor):
        pass

    assert from_hf_processor(Named(), (40, 60), (224, 224)).matrix.shape == (3, 3)


def test_what_is_no_processor_is_refused():
    with pytest.raises(ConfigError, match="Identity: it is no image processor of transformers 5"):
        from_hf_processor(torch.nn.Identity(), (40, 60), (30, 30))


def test_a_view_of_another_size_is_refused():
    processor = make("Bit", "torchvision", size={"shortest_edge": 256}, crop_size=224)
    with pytest.raises(GeometryError, match=r"makes views of \(224, 224\)"):
        from_hf_processor(processor, (480, 640), (256, 256))
    processor.crop_size = {"shortest_edge": 3}
    with pytest.raises(ConfigError, match=r"processor.crop_size. must say height and width"):
        from_hf_processor(processor, (480, 640), (224, 224))
    processor.crop_size = 224
    with pytest.raises(ConfigError, match="must be a dictionary such as"):
        from_hf_processor(processor, (480, 640), (224, 224))
