"""Properties of the procedural scenes: what they promise about determinism, masks and labels."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from local_distill.errors import LocalDistillError
from local_distill.training.scene_shapes import REACH, SHAPES, TEXTURES, outline, texture
from local_distill.training.scenes import Scene, SyntheticScenes


def to_tensor(image):
    return torch.from_numpy(np.array(image))


def same(a: Scene, b: Scene) -> bool:
    return a.label == b.label and all(
        torch.equal(p, q) for p, q in zip(a, b, strict=True) if isinstance(p, torch.Tensor)
    )


def classes_of_objects(scene: Scene) -> list[int]:
    numbers = scene.instance_mask.unique().tolist()
    return [
        int(scene.class_mask[scene.instance_mask == n].unique().item()) - 1 for n in numbers if n
    ]


def test_a_scene_depends_on_seed_index_and_settings_alone():
    scenes = SyntheticScenes(20, seed=5)
    later = scenes.scene(7)
    assert same(scenes.scene(7), later)
    assert same(SyntheticScenes(8, seed=5).scene(-1), later)
    assert same(pickle.loads(pickle.dumps(scenes)).scene(7), later)
    assert not torch.equal(scenes.scene(8).image, later.image)
    assert not torch.equal(SyntheticScenes(20, seed=6).scene(7).image, later.image)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_workers_do_not_change_a_scene(workers):
    scenes = SyntheticScenes(10, 16, transform=to_tensor)
    images, labels = zip(*DataLoader(scenes, batch_size=4, num_workers=workers), strict=True)
    wanted = torch.stack([scenes.scene(i).image.permute(1, 2, 0) for i in range(10)])
    assert torch.equal(torch.cat(images), wanted)
    assert torch.cat(labels).tolist() == scenes.targets


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    seed=st.integers(0, 2**40),
    num_classes=st.integers(2, 25),
    fewest=st.integers(1, 6),
    radius=st.floats(0.01, 0.5),
    purity=st.floats(0.5, 1),
)
def test_any_size_gives_masks_that_agree(height, width, seed, num_classes, fewest, radius, purity):
    scenes = SyntheticScenes(
        3,
        (height, width),
        seed=seed,
        num_classes=num_classes,
        objects=(fewest, fewest + 2),
        radius=(radius / 2, radius),
        purity=purity,
    )
    scene = scenes.scene(2)
    assert scene.image.shape == (3, height, width)
    assert scene.image.dtype == torch.uint8
    for mask in (scene.class_mask, scene.instance_mask):
        assert mask.shape == (height, width)
        assert mask.dtype == torch.int64
    assert torch.equal(scene.class_mask > 0, scene.instance_mask > 0)
    assert set(scene.class_mask.unique().tolist()) <= set(range(num_classes + 1))
    assert set(scene.instance_mask.unique().tolist()) <= set(range(fewest + 3))
    classes_of_objects(scene)  # .item() fails where an object has two classes
    image, label = scenes[2]
    assert image.size == (width, height)
    assert label == scene.label == scenes.targets[2]


def test_the_label_is_the_class_of_most_objects():
    scenes = SyntheticScenes(300, seed=3)
    shares = []
    for i in range(len(scenes)):
        scene = scenes.scene(i)
        classes = classes_of_objects(scene)
        own = classes.count(scene.label)
        # The numbers have no gaps: no object is wholly hidden.
        assert len(classes) == scene.instance_mask.max()
        assert 3 <= len(classes) <= 5
        assert 2 * own > len(classes)
        shares.append(own / len(classes))
    assert abs(np.mean(shares) - 0.75) < 0.03


def test_purity_one_leaves_no_other_class():
    scenes = SyntheticScenes(20, purity=1.0)
    for scene in map(scenes.scene, range(20)):
        assert set(classes_of_objects(scene)) == {scene.label}


def test_objects_occlude_each_other_sometimes():
    """Where outlines meet, the later object's number stands; some objects must lose area so."""
    alone = SyntheticScenes(60, objects=(1, 1), radius=(0.15, 0.15), num_classes=2)
    crowd = SyntheticScenes(60, objects=(8, 8), radius=(0.15, 0.15), num_classes=2)
    area = np.mean([(s.instance_mask > 0).sum() for s in map(alone.scene, range(60))])
    covered = np.mean([(s.instance_mask > 0).sum() for s in map(crowd.scene, range(60))])
    assert area < covered < 0.97 * 8 * area


def test_labels_are_balanced():
    counts = np.bincount(SyntheticScenes(4000).targets, minlength=10)
    # Five standard deviations of a fair draw.
    assert abs(counts - 400).max() < 5 * np.sqrt(4000 * 0.1 * 0.9)


@pytest.mark.parametrize("sizes", [(64, 128), ((48, 64), (144, 192))])
def test_a_larger_size_enlarges_the_same_scene(sizes):
    for index in range(5):
        small, large = (SyntheticScenes(5, size).scene(index) for size in sizes)
        height, width = small.class_mask.shape
        pooled = torch.nn.functional.adaptive_avg_pool2d(large.image.float(), (height, width))
        assert (pooled - small.image.float()).abs().mean() < 6
        factor = large.class_mask.shape[0] // height
        agree = large.instance_mask[factor // 2 :: factor, factor // 2 :: factor]
        assert (agree == small.instance_mask).float().mean() > 0.97


def test_ten_classes_use_each_shape_and_texture_twice():
    pairs = [name.split() for name in SyntheticScenes(1).classes]
    for names, wanted in zip(zip(*pairs, strict=True), (TEXTURES, SHAPES), strict=True):
        assert sorted(names) == sorted(2 * wanted)
    assert len(set(SyntheticScenes(1, num_classes=25).classes)) == 25


def test_images_are_not_flat_and_transform_gets_the_pil_image():
    seen = []
    scenes = SyntheticScenes(4, (20, 31), transform=lambda image: seen.append(image) or "view")
    assert scenes[1] == ("view", scenes.targets[1])
    assert seen[0].mode == "RGB"
    assert seen[0].size == (31, 20)
    assert to_tensor(seen[0]).float().std() > 10


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_have_like_areas_and_true_distances(shape):
    step = 0.005
    axis = np.arange(-1.6, 1.6, step, dtype=np.float32)
    u, v = np.meshgrid(axis, axis)
    distance = outline(shape, u, v)
    assert 1.5 < (distance < 0).sum() * step**2 < 2.9
    assert np.hypot(u, v)[distance < 0].max() < REACH + step
    # Of slope 1 by the edge: that is what makes `0.5 - distance` a pixel's coverage.
    slope = np.hypot(*np.gradient(distance, step))
    edge = (np.abs(distance) < 0.05) & (np.hypot(u, v) > 0.2)
    assert abs(np.median(slope[edge]) - 1) < 0.01
    assert np.mean(abs(slope[edge] - 1) < 0.02) > 0.9


@pytest.mark.parametrize("name", TEXTURES)
def test_textures_have_two_tones(name):
    u, v = np.meshgrid(*2 * [np.linspace(-1, 1, 81, dtype=np.float32)])
    tone = texture(name, u, v, np.linspace(0, 0.9, 6, dtype=np.float32), 40.0)
    assert tone.dtype == np.float32
    assert abs(tone).max() <= 1
    assert np.mean(abs(tone) == 1) > 0.6
    assert 0.1 < np.mean(tone > 0) < 0.9


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("count", -1),
        ("count", 2.5),
        ("size", 0),
        ("size", (64, 64, 3)),
        ("size", 64.0),
        ("seed", -1),
        ("num_classes", 1),
        ("num_classes", 26),
        ("objects", (0, 3)),
        ("objects", (4, 3)),
        ("objects", 4),
        ("radius", (0.0, 0.2)),
        ("radius", (0.3, 0.2)),
        ("radius", (0.1, 0.6)),
        ("radius", (0.1, float("nan"))),
        ("purity", 0.4),
        ("purity", 1.1),
        ("transform", "crop"),
    ],
)
def test_wrong_arguments_are_named(argument, value):
    settings = {"count": 4, argument: value}
    with pytest.raises(LocalDistillError, match=f"`{argument}` is .*; give "):
        SyntheticScenes(**settings)


@pytest.mark.parametrize("index", [4, -5])
def test_an_index_out_of_range_is_an_index_error(index):
    scenes = SyntheticScenes(4, 16)
    for access in (scenes.scene, scenes.__getitem__):
        with pytest.raises(IndexError, match="has 4 scenes"):
            access(index)


def test_an_empty_set_is_a_set():
    scenes = SyntheticScenes(0)
    assert len(scenes) == 0
    assert scenes.targets == []
    assert list(scenes) == []
