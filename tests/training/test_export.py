import json

import pytest
import timm
import torch
from safetensors import safe_open
from torch import nn

from local_distill import ConfigError, DataError
from local_distill.backbones import TimmBackbone, tiny_vit
from local_distill.teacher import EmaTeacher
from local_distill.training.checkpoints import CheckpointStore, CheckpointWriteError
from local_distill.training.export import export_backbone

CASES = {
    "vit_tiny": ("vit_tiny_patch16_224", {"dynamic_img_size": True}),
    "vit_small": ("vit_small_patch16_224", {"layers": True, "depth": 2}),
    "register_tokens": ("vit_small_patch14_reg4_dinov2", {"depth": 1, "img_size": 98}),
    "swin_tiny": ("swin_tiny_patch4_window7_224", {"depths": [2, 2, 2, 1]}),
    "resnet18": ("resnet18", {}),
    "tiny_vit": ("tiny_vit", {"width": 48, "depth": 2, "patch_layers": True}),
}


class Network(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.global_head = nn.Linear(backbone.embed_dim, 4)


def network(name, kwargs):
    return Network(tiny_vit(**kwargs) if name == "tiny_vit" else TimmBackbone(name, **kwargs))


def saved_run(folder, name, kwargs, with_teacher):
    """A run of that backbone whose teacher, where it has one, differs from its network."""
    trained = network(name, kwargs)
    teacher = EmaTeacher(trained) if with_teacher else None
    state = {
        "step": 12,
        "config": {"backbone": {"name": name, "pretrained": False, "kwargs": kwargs}},
        "teacher": teacher and teacher.state_dict(),
    }
    if with_teacher:
        trained = network(name, kwargs)
    CheckpointStore(folder / "checkpoints").save(12, state | {"network": trained.state_dict()})
    return (teacher.module if with_teacher else trained).backbone


@pytest.mark.parametrize("case", CASES)
def test_timm_loads_what_was_trained(tmp_path, case):
    name, kwargs = CASES[case]
    backbone = saved_run(tmp_path, name, kwargs, with_teacher=case != "resnet18").eval()
    path = export_backbone(tmp_path, tmp_path / "out.safetensors")
    with safe_open(path, "pt") as opened:
        told = opened.metadata()
    kwargs = json.loads(told["timm_kwargs"])
    assert told["step"] == "12"
    model = timm.create_model(told["timm_name"], checkpoint_path=str(path), **kwargs).eval()
    assert model.state_dict().keys() == backbone.model.state_dict().keys()
    images = torch.randn(2, 3, *((96, 128) if case != "register_tokens" else (98, 112)))
    with torch.no_grad():
        assert torch.equal(model.forward_features(images), backbone.model.forward_features(images))
    line = told["load"].replace("'out.safetensors'", repr(str(path)))
    again = eval(line, {"timm": timm})  # what the file says of itself holds
    assert torch.equal(next(again.parameters()), next(model.parameters()))


def test_the_plain_call_for_a_vit(tmp_path):
    backbone = saved_run(tmp_path, "vit_tiny_patch16_224", {}, with_teacher=True)
    path = export_backbone(tmp_path / "checkpoints", tmp_path / "vit.safetensors")
    model = timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(path), num_classes=0)
    assert torch.equal(model.pos_embed, backbone.model.pos_embed)


def test_weights_that_share_memory(tmp_path):
    weight = torch.randn(4, 4)
    whole = {f"backbone.model.{name}": weight for name in "ab"}
    whole["backbone.model.t"] = weight.T
    state = {"config": {"backbone": {"name": "resnet18"}}, "network": whole}
    store = CheckpointStore(tmp_path)
    store.save(1, state)
    path = export_backbone(tmp_path, tmp_path / "shared.safetensors")
    with safe_open(path, "pt") as opened:
        assert sorted(opened.keys()) == ["a", "b", "t"]
        assert torch.equal(opened.get_tensor("t"), weight.T)


def test_what_cannot_be_exported(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    with pytest.raises(DataError, match="without checkpoints"):
        export_backbone(tmp_path, tmp_path / "a.safetensors")
    store.save(1, {"network": {"head.weight": torch.zeros(2)}, "config": {}})
    with pytest.raises(DataError, match=r"no backbone: wanted .*backbone.*got \['head.weight'\]"):
        export_backbone(tmp_path, tmp_path / "a.safetensors")
    store.save(2, {"network": {"backbone.model.w": torch.zeros(2)}, "config": {}})
    with pytest.raises(DataError, match="does not say which backbone"):
        export_backbone(tmp_path, tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=r"a\.pth' must end in \.safetensors"):
        export_backbone(tmp_path, tmp_path / "a.pth")
    config = {"backbone": {"name": "resnet18"}}
    store.save(3, {"network": {"backbone.model.w": torch.zeros(2)}, "config": config})
    with pytest.raises(CheckpointWriteError, match="nowhere"):
        export_backbone(tmp_path, tmp_path / "nowhere" / "a.safetensors")
