"""All tasks on one backbone, and what `local-distill eval` does with them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from local_distill import ConfigError, DataError, TokenGrid
from local_distill.backbones import BackboneOutput, TimmBackbone, tiny_vit
from local_distill.training import DemoCrop, SyntheticScenes, knn_accuracy
from local_distill.training.checkpoints import CheckpointStore
from local_distill.training.evaluation import (
    TASKS,
    EvaluationImages,
    StoredImages,
    correspondence_views,
    draw_scenes,
    draw_view_pairs,
    evaluate_backbone,
    extract_features,
    frozen_features,
)
from local_distill.training.evaluation.evaluate import evaluate
from local_distill.training.options import BackboneOptions, SceneOptions
from local_distill.training.views import eval_transform

TINY = BackboneOptions(kwargs={"img_size": 32, "width": 24, "depth": 2, "num_heads": 2})


@pytest.fixture(scope="module")
def scenes():
    voters, tested = SyntheticScenes(30, 32), SyntheticScenes(12, 32, seed=1)
    pairs = draw_view_pairs(tested, correspondence_views(32))
    return draw_scenes(voters), draw_scenes(tested), pairs


class Oracle(nn.Module):
    """Reads the classes off pixels that hold them: red is 20 × the class."""

    def forward(self, images):
        red = (images[:, 0] * 0.229 + 0.485) * 255 / 20
        classes = red[:, 4::8, 4::8].round().long().flatten(1)
        tokens = nn.functional.one_hot(classes, 6).float()
        whole = nn.functional.one_hot(tokens[..., 1:].sum(1).argmax(1), 5).float()
        return BackboneOutput(whole, tokens, (0 * whole + 1, whole), (0 * tokens + 1, tokens))

    def token_grid(self, view_size):
        return TokenGrid.tiling(view_size[0] // 8, view_size[1] // 8, view_size)


def told(n, seed):
    """Images of vertical halves: background and the label's class."""
    labels = torch.arange(n) % 5
    masks = torch.zeros(n, 32, 32, dtype=torch.uint8)
    masks[:, :, 16:] = (1 + labels).to(torch.uint8)[:, None, None]
    flip = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.5
    masks = torch.where(flip[:, None, None], masks.flip(-1), masks)
    images = torch.zeros(n, 3, 32, 32, dtype=torch.uint8)
    images[:, 0] = masks * 20
    return EvaluationImages(images, labels, masks, tuple("abcde"))


def test_a_backbone_that_knows_all_gets_it_all_right():
    found = evaluate_backbone(
        Oracle(), told(60, 0), told(25, 1), tasks=["knn", "linear", "layers", "dense",
                                                     "segmentation"], k=[5, 1]
    )  # fmt: skip
    for name in ("knn/global_token", "knn/global_token/1", "linear/global_token",
                 "dense/accuracy", "dense/miou", "segmentation/accuracy",
                 "segmentation/miou"):  # fmt: skip
        assert found.numbers[name] == 1, name
    assert found.layers["knn/global_token"][1] == found.layers["linear/global_token"][1] == 1
    assert found.layers["linear/mean_of_tokens"][0] == found.numbers["knn/majority"]
    assert found.numbers["knn/majority"] == pytest.approx(0.2)
    assert found.numbers["dense/majority_accuracy"] == pytest.approx(0.5)
    assert found.numbers["segmentation/majority_miou"] == pytest.approx(0.5 / 6)
    assert found.counts == {
        "voters": 60, "tested": 25, "voting_tokens": 60 * 16, "tested_tokens": 25 * 16,
        "tested_pixels": 25 * 32 * 32,
    }  # fmt: skip


def test_all_tasks_on_scenes_the_same_each_time(scenes):
    torch.manual_seed(0)
    backbone = tiny_vit(img_size=32, width=24, depth=2, num_heads=2).train()
    found = evaluate_backbone(backbone, *scenes, k=5, most_tokens=100, batch_size=8)
    assert backbone.training
    assert set(found.seconds) == {"features", *TASKS}
    assert {name.partition("/")[0] for name in found.numbers} == set(TASKS)
    assert all(len(curve) == 2 for curve in found.layers.values())
    assert found.layers["knn/global_token"][-1] == found.numbers["knn/global_token"]
    assert found.layers["linear/mean_of_tokens"][-1] == found.numbers["linear/mean_of_tokens"]
    assert found.counts["voting_tokens"] == 30 * 4  # 100 / 30, rounded up
    torch.rand(3)
    again = evaluate_backbone(backbone, *scenes, k=5, most_tokens=100, batch_size=30)
    assert again.numbers == pytest.approx(found.numbers, abs=1e-4)
    less = evaluate_backbone(backbone, *scenes[:2], tasks=["layers"], k=5, layer_probes=False)
    assert set(less.layers) == {"knn/global_token", "knn/mean_of_tokens"}


def test_features_are_those_of_the_plain_transform():
    backbone = tiny_vit(img_size=16, width=24, depth=2)
    scenes = SyntheticScenes(5, 40)
    whole, means, labels = extract_features(backbone, scenes, eval_transform(24))
    found = frozen_features(backbone, draw_scenes(scenes, 24), layers=True, tokens=True,
                            batch_size=2)  # fmt: skip
    torch.testing.assert_close(found.global_token, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.mean_of_tokens, means, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.labels, labels)
    layered = TimmBackbone(backbone.model, layers=True, patch_layers=True).eval()
    with torch.inference_mode():
        images = torch.stack([eval_transform(24)(scenes[i][0]) for i in range(5)])
        out = layered(images)
    torch.testing.assert_close(found.layers[0], out.layers[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.layer_means[0], out.patch_layers[0].mean(1),
                               rtol=1e-4, atol=1e-5)  # fmt: skip
    assert found.tokens.shape == (5, 9, 24)
    # drawn tokens keep their labels
    few = frozen_features(backbone, draw_scenes(scenes, 24), tokens=True, most_tokens=11, seed=3)
    assert few.tokens.shape == (5, 3, 24)
    for i in range(5):
        for token, label in zip(few.tokens[i], few.token_labels[i], strict=True):
            same = (found.tokens[i] - token).abs().amax(1) < 1e-4
            assert label in found.token_labels[i][same]


def test_what_a_task_needs_is_said(scenes):
    backbone = tiny_vit(img_size=32, width=24, depth=1)
    voters, tested, _ = scenes
    bare = EvaluationImages(tested.images, None, None, ())
    for arguments, tasks, error, text in (
        ((voters, tested), ["knn", "knm"], ConfigError, "'knm'"),
        ((voters, tested), [], ConfigError, "`tasks` must be some of"),
        ((voters, None), ["linear"], ConfigError, "need `train` and `test`"),
        ((voters, tested), ["correspondence"], ConfigError, "draw_view_pairs"),
        ((voters, bare), ["layers"], DataError, "`test` has no classes, as a flat folder"),
        ((bare, tested), ["segmentation"], DataError, "`train` has no masks"),
        ((told(5, 0), tested), ["knn"], DataError, "`train` has the classes"),
    ):
        with pytest.raises(error, match=text):
            evaluate_backbone(backbone, *arguments, tasks=tasks)
    with pytest.raises(ConfigError, match="`k` is empty"):
        evaluate_backbone(backbone, voters, tested, tasks=["knn"], k=[])
    with torch.no_grad():
        backbone.model.cls_token.fill_(float("nan"))
    with pytest.raises(DataError, match="not finite"):
        evaluate_backbone(backbone, voters, tested, tasks=["knn"])


def run_folder(folder):
    torch.manual_seed(5)
    network = TINY.build()
    state = {f"module.backbone.{name}": value for name, value in network.state_dict().items()}
    config = {"backbone": {"name": TINY.name, "pretrained": False, "kwargs": TINY.kwargs}}
    path = CheckpointStore(folder / "checkpoints").save(
        200, {"step": 200, "config": config, "network": {}, "teacher": state}
    )
    return network, path


def test_evaluate_a_run(tmp_path, capsys):
    network, checkpoint = run_folder(tmp_path / "run")
    options = {"scenes": SceneOptions(20, 32), "test_count": 8, "size": 32, "k": 3,
               "pair_count": 4, "most_tokens": 100, "accelerator": "cpu"}  # fmt: skip
    found = evaluate(str(tmp_path / "run"), **options)
    text = capsys.readouterr().out
    assert f"{found.numbers['segmentation/miou']:.4f}" in text
    record = json.loads((tmp_path / "run" / "eval" / "scenes.json").read_text())
    assert record["numbers"] == found.numbers
    assert record["layers"] == found.layers
    assert record["settings"]["tasks"] == list(TASKS)
    assert record["counts"]["voters"] == 20  # fewer scenes than asked for
    for name in ("scenes-layers.png", "scenes-correspondence.png"):
        assert str(tmp_path / "run" / "eval" / name) in text
        with Image.open(tmp_path / "run" / "eval" / name) as picture:
            assert picture.size[0] > 500
            assert len(set(picture.convert("L").get_flattened_data())) > 30
    # the same of the live model
    voters, tested = SyntheticScenes(20, 32), SyntheticScenes(8, 32, seed=1)
    many, few = (extract_features(network, part, eval_transform(32)) for part in (voters, tested))
    assert found.numbers["knn/global_token"] == pytest.approx(
        knn_accuracy(many[0], many[2], few[0], few[2], k=3)
    )
    # a checkpoint's file, some tasks, names of one's own
    evaluate(str(checkpoint), tasks=["knn"], **options)
    assert (tmp_path / "run" / "eval" / f"scenes-{checkpoint.stem}.json").is_file()
    evaluate(backbone=TINY, tasks=["correspondence"], views=DemoCrop(), name="mine",
             output=str(tmp_path / "out"), **options)  # fmt: skip
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "mine.json", "mine-correspondence.png"
    }  # fmt: skip


def folder_of_masks(folder, count=8, suffix=".jpg"):
    for i in range(count):
        scene = SyntheticScenes(count, (40, 52)).scene(i)
        mask = scene.class_mask.numpy().astype(np.uint8)
        mask[:4] = 255
        for kind, array, ending in (
            ("images", scene.image.permute(1, 2, 0).numpy(), suffix),
            ("masks", mask, ".png"),
        ):
            target = folder / kind / ("cat", "dog")[i % 2] / f"{i}{ending}"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(target)
    return folder


def test_evaluate_folders_with_masks(tmp_path, capsys):
    folder = folder_of_masks(tmp_path / "photos", suffix=".png")
    image, label, mask = StoredImages(str(folder), 20)[5]
    assert image.shape == (3, 20, 20)
    assert label == 1
    scene = SyntheticScenes(8, (40, 52)).scene(3)  # cat: 0 2 4 6, dog: 1 3 5 7
    wide = scene.class_mask.clone()
    wide[:4] = 255
    # 52 × 40 is halved to 26 × 20, and 3 columns are cut off on each side; NEAREST_EXACT takes
    # the pixel at 2 i + 1
    assert torch.equal(mask.long(), wide[1::2, 1::2][:, 3:23])
    options = {"size": 32, "k": 1, "pair_count": 3, "accelerator": "cpu", "backbone": TINY,
               "output": str(tmp_path / "out")}  # fmt: skip
    found = evaluate(train_data=str(folder), test_data=str(folder), **options)
    assert found.numbers["knn/global_token"] == 1  # each image finds itself
    assert found.numbers["dense/accuracy"] == 1
    assert found.counts["tested_pixels"] < 8 * 32 * 32
    assert (tmp_path / "out" / "photos.json").is_file()
    some = StoredImages(str(folder), 16, count=4)
    assert [some[i][1] for i in range(len(some))] == [0, 0, 1, 1]
    capsys.readouterr()


def test_folders_with_classes_alone_and_a_bad_file(tmp_path, capsys):
    folder = folder_of_masks(tmp_path / "photos") / "images"
    (folder / "cat" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    options = {"size": 32, "k": 1, "pair_count": 3, "accelerator": "cpu", "backbone": TINY,
               "output": str(tmp_path / "out")}  # fmt: skip
    found = evaluate(train_data=str(folder), test_data=str(folder), **options)
    assert {name.partition("/")[0] for name in found.numbers} == {
        "knn", "linear", "layers", "correspondence"
    }  # fmt: skip
    assert found.numbers["knn/global_token"] >= 8 / 9
    flat = folder / "dog"
    alone = evaluate(train_data=str(flat), test_data=str(flat), tasks=["correspondence"], **options)
    assert "correspondence/median" in alone.numbers
    capsys.readouterr()
    other = folder_of_masks(tmp_path / "other") / "images"
    (other / "dog").rename(other / "wolf")
    for changes, error, text in (
        ({"train_data": str(flat), "test_data": str(flat)}, DataError, "flat folder"),
        ({"train_data": str(flat)}, ConfigError, "must both be folders, or both scenes"),
        ({"train_data": str(folder), "test_data": str(other)}, DataError, r"'cat', 'wolf'"),
        ({"train_data": "no/such", "test_data": str(flat)}, DataError, "no/such"),
        ({"train_count": 0}, ConfigError, "`train_count`"),
        ({"test_count": 0}, ConfigError, "`test_count`"),
        ({"pair_count": 0}, ConfigError, "`pair_count`"),
        ({"name": "a/b"}, ConfigError, "`name`"),
        ({"accelerator": "abacus"}, ConfigError, "`accelerator` is 'abacus'"),
        ({"checkpoint": str(tmp_path / "no.ckpt")}, DataError, "no.ckpt"),
    ):
        with pytest.raises(error, match=text):
            evaluate(**{**options, **changes})


def test_bad_masks_are_named(tmp_path):
    folder = folder_of_masks(tmp_path / "photos", 4)
    mask = folder / "masks" / "dog" / "1.png"
    for picture, text in (
        (Image.new("L", (9, 9)), "9 × 9 pixels, but its image"),
        (Image.new("RGB", (52, 40)), "mode RGB"),
        (Image.new("I;16", (52, 40)), "mode I"),
    ):
        picture.save(mask)
        with pytest.raises(DataError, match=text):
            StoredImages(str(folder), 16)[2]
    mask.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1\.png.* cannot be read"):
        StoredImages(str(folder), 16)[2]
    mask.unlink()
    with pytest.raises(DataError, match="1 of 4 images have no mask"):
        StoredImages(str(folder), 16)
    (folder / "images" / "cat" / "0.jpg").write_bytes(b"no image")
    (folder / "images" / "dog" / "1.jpg").unlink()
    with pytest.raises(DataError, match=r"0\.jpg.* cannot be read, mend or remove"):
        StoredImages(str(folder), 16)[0]
