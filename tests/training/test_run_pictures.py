"""Pictures of a run are comparable, and a run with them is the run without."""

import logging
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from local_distill import MultiCrop
from local_distill.backbones import TimmBackbone, tiny_vit
from local_distill.errors import ConfigError
from local_distill.training.run_pictures import RunPictures
from local_distill.training.scenes import SyntheticScenes

CROP = MultiCrop(global_size=16, local_size=8, local_count=1)


def network(seed=0, **settings):
    torch.manual_seed(seed)
    return tiny_vit(img_size=16, width=24, depth=1, **settings)


def pictures(folder, views=CROP, **settings):
    return RunPictures(folder, SyntheticScenes(6, (40, 52)), views, count=2, **settings)


class DrawsFromEverywhere:
    """Views whose pipeline draws from python's and numpy's generators as well."""

    num_global = 1

    def __call__(self, image):
        random.random()
        np.random.rand()  # noqa: NPY002
        return CROP(image)


def global_state():
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002
    )


def test_random_numbers_modes_and_gradients_are_left_alone(tmp_path):
    backbone = network(drop_path_rate=0.5).train()
    backbone.model.norm.eval()  # a frozen part
    for parameter in backbone.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    modes = [module.training for module in backbone.modules()]
    weights = {name: value.clone() for name, value in backbone.state_dict().items()}
    before = global_state()
    paths = pictures(tmp_path, DrawsFromEverywhere()).draw(3, backbone)
    assert global_state() == before
    assert [module.training for module in backbone.modules()] == modes
    assert True in modes
    assert False in modes
    assert all(bool((parameter.grad == 2).all()) for parameter in backbone.parameters())
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert torch.is_grad_enabled()
    assert all(torch.equal(value, weights[name]) for name, value in backbone.state_dict().items())
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        "pictures/step-00000003-matches.png",
        "pictures/step-00000003-tokens.png",
    ]
    for path in paths:
        with Image.open(path) as image:
            assert min(image.size) > 200
            assert len(set(image.convert("L").get_flattened_data())) > 50
    assert len(list((tmp_path / "pictures").iterdir())) == 2


def test_the_same_weights_give_the_same_bytes_and_others_do_not(tmp_path):
    backbone = network()
    torch.manual_seed(11)  # whatever the run has drawn meanwhile
    first = pictures(tmp_path / "a").draw(7, backbone)
    torch.rand(5)
    again = pictures(tmp_path / "b").draw(7, backbone)
    other = pictures(tmp_path / "c").draw(7, network(seed=1))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert all(a.read_bytes() != c.read_bytes() for a, c in zip(first, other, strict=True))


def test_a_network_of_one_size_is_drawn_at_that_size(tmp_path):
    backbone = TimmBackbone(
        "vit_tiny_patch16_224", img_size=32, patch_size=16, embed_dim=24, depth=1, num_heads=2,
        dynamic_img_size=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="alone"):
        backbone.token_grid((64, 64))
    paths = pictures(tmp_path, MultiCrop(global_size=32, local_count=0)).draw(1, backbone)
    assert len(paths) == 2


def test_what_cannot_be_drawn_does_not_end_the_run(tmp_path, caplog):
    broken = network()
    nn.init.constant_(broken.model.norm.weight, torch.nan)
    with caplog.at_level(logging.WARNING):
        paths = pictures(tmp_path / "nan").draw(1, broken)
    assert [path.name for path in paths] == ["step-00000001-matches.png"]  # nothing matched: shown
    assert "NaN" in caplog.text
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "pictures").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert pictures(tmp_path / "full").draw(1, network()) == []
    assert "step-00000001-tokens.png" in caplog.text


def test_settings_that_cannot_be(tmp_path):
    with pytest.raises(ConfigError, match="empty"):
        RunPictures(tmp_path, [], CROP)
    with pytest.raises(ConfigError, match="num_global"):
        RunPictures(tmp_path, SyntheticScenes(2, 32), lambda image: CROP(image))
    with pytest.raises(ConfigError, match="count"):
        RunPictures(tmp_path, SyntheticScenes(2, 32), CROP, count=0)
