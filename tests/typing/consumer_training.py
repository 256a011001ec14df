"""A user's training code: views, recipe, teacher, a method of one's own for the trainer."""

from typing import assert_type

from torch import Tensor, nn

import local_distill as ld
from local_distill.losses import DistillationTerms, GlobalLocalDistillationLoss
from local_distill.recipes import glsd
from local_distill.schedules import cosine
from local_distill.training import Method
from local_distill.training.methods import Glsd
from local_distill.transforms import Tracked


def views(image: Tensor) -> tuple[list[Tensor], list[ld.CropGeometry]]:
    """Names that need an extra have their types as well."""
    crops = ld.MultiCrop(local_count=2)
    assert_type(ld.track(crops), Tracked)
    result = crops.forward(image)
    assert_type(result, tuple[list[Tensor], list[ld.CropGeometry]])
    return result


def step(network: nn.Module, outputs: list[ld.ViewOutput], share: float) -> DistillationTerms:
    """What a recipe gives, and what its step says."""
    criterion = glsd(num_prototypes=16, matching="similarity")
    assert_type(criterion, GlobalLocalDistillationLoss)
    terms = criterion.forward(outputs, outputs[:2], teacher_temp=0.04)
    assert_type(terms.loss, Tensor)
    assert_type(terms.matches, dict[tuple[int, int], ld.Matches])
    teacher = ld.EmaTeacher(network)
    momentum = cosine(share, start=0.996, end=1.0, total=1.0)
    assert_type(momentum, float)
    teacher.update(network, momentum)
    return terms


def backbone_outputs(backbone: ld.TimmBackbone, images: Tensor) -> ld.Tokens:
    """Tokens where they lie."""
    grid = backbone.token_grid((224, 224))
    assert_type(grid, ld.TokenGrid)
    return ld.Tokens(backbone.forward(images).patch_tokens, None, grid)


def own_method(method: Glsd) -> Method:
    """Every method of the trainer is a `Method`."""
    return method
