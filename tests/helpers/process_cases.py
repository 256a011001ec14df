"""Every loss and recipe that sends something, as cases of one table: to add one is one line.

A case says how the module is made and how it is called on a batch, of which every process holds a
share; process_grid.py runs it.

Left out is what looks at its own process's batch alone, by its nature or as published:
- `KoLeoLoss` without ``across_processes`` and ``GramAnchoringLoss(scope="batch")``, whose
  neighbours and whose matrix stay within a process: they are `WITHIN`, of which the processes'
  values weigh by what they count;
- ``cost_scale="batch"`` of CrOC and CrIBo, which scales costs by the largest of the process's
  batch, and ``cycle="batch"`` of CrIBo's queue, whose way back competes with the process's other
  images: here both are of the image, so the rest of these recipes is whole;
- ``sdssl_simclr(legacy=True)``, which loses the gradient of other processes because that is the
  published defect: "simclr, legacy" of `WITHIN` is its objective.
BatchNorm in the heads of SDSSL takes the statistics of the whole batch, as SyncBatchNorm does,
which torch has for GPUs alone: see `WholeBatchNorm`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from local_distill import (
    Centering,
    GlobalDistillationLoss,
    LocalDistillationLoss,
    MaskedDistillationLoss,
    Matches,
    PrototypeLogits,
    TokenGrid,
    Tokens,
    ViewOutput,
    from_box,
)
from local_distill.distributed import all_gather_with_gradient, process_rank, row_counts
from local_distill.losses.dense_contrastive import DenseContrastiveLoss
from local_distill.losses.global_contrastive import GlobalContrastiveLoss
from local_distill.losses.gram import GramAnchoringLoss
from local_distill.losses.intermediate import IntermediateDistillationLoss
from local_distill.losses.koleo import KoLeoLoss
from local_distill.losses.local_variance_covariance import VICRegLLoss
from local_distill.losses.negative_queue import NegativeQueue
from local_distill.losses.patch_order import PatchOrderLoss
from local_distill.losses.pixel_propagation import PixelConsistencyLoss
from local_distill.losses.variance_covariance import VICRegLoss
from local_distill.losses.view_objectives import ByolObjective, MocoV3Objective, SimclrObjective
from local_distill.recipes import (
    CrocView,
    adasim,
    cribo,
    croc,
    densecl,
    dino,
    esvit,
    glsd,
    ibot,
    pixpro,
    sdssl_byol,
    sdssl_moco,
    sdssl_simclr,
    vicregl,
)
from local_distill.targets import SinkhornKnopp

TOTAL = 8  # images of the whole batch, however they are spread
C, D, DEPTH = 5, 4, 3
GRIDS = [TokenGrid.tiling(rows, cols, (32, 48)) for rows, cols in ((2, 3), (2, 2), (1, 2))]
SOURCE = (48, 64)


@functools.cache
def batch(step):
    """The whole batch of a step, the same on every rank: lists, one tensor a view, images first.

    ``s_`` is the student's and gets a gradient, ``t_`` the teacher's and may be poisoned.
    """
    g = torch.Generator().manual_seed(step)

    def real(*shape):
        return torch.randn(TOTAL, *shape, generator=g, dtype=torch.float64)

    def share(*shape):
        return torch.rand(TOTAL, *shape, generator=g, dtype=torch.float64)

    sizes = [grid.num_tokens for grid in GRIDS]
    found = {}
    for side in "st":
        found[f"{side}_whole"] = [real(C) for _ in GRIDS]
        found[f"{side}_tokens"] = [real(n, C) for n in sizes]
        # far from 0 and of spread below 1: the mean matters, and VICReg's hinge is open
        found[f"{side}_features"] = [0.6 * real(n, D) + 1 for n in sizes]
        found[f"{side}_cls"] = [real(D) for _ in GRIDS]
    found["s_layers"] = [real(DEPTH, D) for _ in range(2)]
    found["t_keys"] = [real(2, n + 1, 3) for n in sizes]  # of two attention heads, [CLS] first
    corner = [share(2) * torch.tensor([24.0, 18.0]) for _ in GRIDS]
    found["box"] = [torch.cat((low, low + 24 + 16 * share(2)), 1) for low in corner]
    found["flip"] = [share() > 0.5 for _ in GRIDS]
    found["masked"] = [share(n) > 0.5 for n in sizes]
    found["weight"], found["index"] = [], []
    for v, q in PAIRS:
        some = share(sizes[v], 1) > 0.3
        found["weight"].append(share(sizes[v], 2) / 2 * some)
        found["index"].append(torch.randint(0, sizes[q], (TOTAL, sizes[v], 2), generator=g))
    found["start"] = [torch.arange(5).repeat(TOTAL, 2, 1) + torch.arange(2)[:, None]]
    found["id"] = [torch.randperm(2 * TOTAL, generator=g)[:TOTAL]]
    return found


PAIRS = ((0, 1), (1, 0), (2, 0))


def matches(x):
    return {
        pair: Matches(index, weight, 1 - weight[..., 0])
        for pair, index, weight in zip(PAIRS, x.index, x.weight, strict=True)
    }


def compact(x):
    return {pair: matches(x)[pair].compact(3) for pair in PAIRS[:2]}


def places(x):
    boxes = [
        from_box(box, (32, 48), SOURCE, hflip=flip) for box, flip in zip(x.box, x.flip, strict=True)
    ]
    return [Tokens(None, box, grid) for box, grid in zip(boxes, GRIDS, strict=True)]


def views(x, side, count, *, wide=False):
    """``count`` views; ``wide``: with features for logits, as contrastive recipes want."""
    names = ("cls", "features") if wide else ("whole", "tokens")
    whole, tokens = (getattr(x, f"{side}_{name}")[:count] for name in names)
    features = getattr(x, f"{side}_features")[:count]
    return [
        ViewOutput(*logits, place._replace(features=found))
        for *logits, place, found in zip(whole, tokens, places(x)[:count], features, strict=True)
    ]


def both(x, students=3, **more):
    return views(x, "s", students, **more), views(x, "t", 2, **more)


def layers(parts):
    """(DEPTH, b, …) made of features, as if each were a layer's."""
    return [torch.stack((part.sin(), part.square(), part)) for part in parts]


def croc_views(x, side):
    found = []
    for v, place in enumerate(places(x)[:2]):
        features = getattr(x, f"{side}_features")[v]
        view = CrocView(
            getattr(x, f"{side}_whole")[v],
            getattr(x, f"{side}_cls")[v],
            Tokens(features) if side == "s" else place._replace(features=features),
        )
        if side == "t":
            view = view._replace(keys=x.t_keys[v][:, :, 1:], cls_keys=x.t_keys[v][:, :, 0])
        found.append(view)
    return found


def on_whole(loss, x):
    return loss(x.s_whole, x.t_whole[:2], teacher_temp=0.1)


def on_tokens(loss, x):
    return loss(x.s_tokens, x.t_tokens, matches(x), teacher_temp=0.1)


def unmultiplied(head, views):
    return [PrototypeLogits(view, head.weight, head.bias) for view in views]


def on_prototypes(loss, x):
    student = unmultiplied(loss.student_head, x.s_features)
    teacher = unmultiplied(loss.teacher_head, x.t_features)
    return loss(student, teacher, matches(x), teacher_temp=0.1)


def on_whole_prototypes(loss, x):
    student = unmultiplied(loss.student_head, x.s_cls)
    teacher = unmultiplied(loss.teacher_head, x.t_cls)
    return loss(student, teacher, teacher_temp=0.1)


def on_features(loss, x):
    return loss(x.s_features, x.t_features, matches(x))


def on_some_rows(loss, x):
    return loss(x.s_cls, [flags[:, 0] for flags in x.masked])


def on_layers(loss, x):
    """Targets without a teacher: the last layer itself, whose gradient flows back."""
    student = layers(x.s_cls)
    return loss(student, [view[-1] for view in student], ratio=0.5, detached_layers=student).loss


def on_token_layers(loss, x):
    student, found = layers(x.s_features), matches(x)
    return loss(student, [view[-1] for view in student], ratio=0.5, matches=found).loss


def call_step(loss, x):
    return loss(*both(x), teacher_temp=0.1).loss


def call_wide_step(loss, x):
    return loss(*both(x, wide=True)).loss


def call_croc(loss, x):
    heads = {"student_head": loss.student_head, "teacher_head": loss.teacher_head}
    student, teacher = croc_views(x, "s"), croc_views(x, "t")
    return loss(student, teacher, initial=x.start[0].flatten(0, 1), teacher_temp=0.1, **heads).loss


def call_cribo(loss, x):
    heads = {"student_head": loss.student_head, "teacher_head": loss.teacher_head}
    more = {"image_id": x.id[0], "initial": x.start[0][:, 0, :3]}
    return loss(*both(x, 2), teacher_temp=0.1, **heads, **more).loss


def call_vicregl(loss, x):
    return loss(x.s_whole, x.s_features, places(x), global_views=2).loss


def call_sdssl(loss, x, ratio=0.5):
    student = [list(view.unbind(1)) for view in x.s_layers]
    return loss(student, None if loss.teacher_head is None else x.t_cls[:2], ratio=ratio).loss


def call_first_sdssl(loss, x):
    return call_sdssl(loss, x, ratio=0.0)  # where legacy differs


def call_adasim(loss, x):
    seen = {"index": x.id[0], "features": x.t_features[0].mean(1)}
    value = loss(*both(x, 2), teacher_temp=0.1, **seen).loss
    loss.sampler.end_epoch()
    return value


class WholeBatchNorm(_BatchNorm):
    """BatchNorm over the rows of all processes: SyncBatchNorm, which torch has for GPUs alone."""

    together = True

    def __init__(self, norm, group):
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine)
        self.load_state_dict(norm.state_dict())
        self.group = group

    def _check_input_dim(self, rows):
        pass

    def forward(self, rows):
        if not self.together:
            return super().forward(rows)
        counts = row_counts(rows, self.group)
        first = sum(counts[: process_rank(self.group)])
        whole = all_gather_with_gradient(rows, self.group, counts=counts)
        return super().forward(whole)[first : first + len(rows)]


def normed(recipe, group):
    for module in list(recipe.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm1d):
                setattr(module, name, WholeBatchNorm(child, group))
    return recipe


def headed(kind, *args, **settings):
    """A recipe whose heads come from the caller, with heads."""
    recipe = kind(*args, **settings)
    recipe.student_head, recipe.teacher_head = nn.Linear(D, C), nn.Linear(D, C)
    return recipe


def tiny_cribo(**settings):
    recipe = cribo(D, C, C, num_clusters=3, queue_images=11, cost_scale="image", **settings)
    recipe.queue.cycle = "image"
    return recipe


def layered(objective, **settings):
    return IntermediateDistillationLoss(objective(**settings), depth=DEPTH)


class Case(NamedTuple):
    """``make(process_group)`` gives the module in its first state, ``call(module, x)`` the loss."""

    make: Callable
    call: Callable


def centered(kind, **settings):
    return lambda group: kind(Centering(C, process_group=group), process_group=group, **settings)


def balanced(kind, **settings):
    return lambda group: kind(
        SinkhornKnopp(C, process_group=group), process_group=group, **settings
    )


def headed_loss(kind):
    return lambda group: headed(centered(kind), group)


def queued(kind, dim):
    # no multiple of any batch, and full in the second step
    return lambda group: kind(NegativeQueue(11, dim, process_group=group), process_group=group)


def plain(kind, *args, **settings):
    return lambda group: kind(*args, process_group=group, **settings)


def sdssl(kind, **settings):
    sizes = {"embed_dim": D, "hidden_dim": 6, "last_hidden_dim": 7, "out_dim": 3}
    return lambda group: normed(kind(DEPTH, process_group=group, **sizes, **settings), group)


OF_IMAGES = {"cost_scale": "image"}
DENSE, GLOBAL = queued(DenseContrastiveLoss, D), queued(GlobalContrastiveLoss, C)
CASES = {
    "global": Case(centered(GlobalDistillationLoss), on_whole),
    "global, balanced": Case(balanced(GlobalDistillationLoss), on_whole),
    "local, all": Case(centered(LocalDistillationLoss, normalize="all"), on_tokens),
    "local, matched": Case(centered(LocalDistillationLoss), on_tokens),
    "local, image": Case(centered(LocalDistillationLoss, normalize="image"), on_tokens),
    "local, balanced": Case(balanced(LocalDistillationLoss), on_tokens),
    "global, prototypes": Case(headed_loss(GlobalDistillationLoss), on_whole_prototypes),
    "local, prototypes": Case(headed_loss(LocalDistillationLoss), on_prototypes),
    "masked": Case(
        centered(MaskedDistillationLoss),
        lambda loss, x: loss(x.s_tokens, x.t_tokens, x.masked, teacher_temp=0.1),
    ),
    "dense contrast": Case(DENSE, on_features),
    "global contrast": Case(GLOBAL, lambda loss, x: loss(x.s_whole, x.t_whole)),
    "pixels, all": Case(plain(PixelConsistencyLoss, normalize="all"), on_features),
    "pixels, matched": Case(plain(PixelConsistencyLoss, normalize="matched"), on_features),
    "pixels, image": Case(plain(PixelConsistencyLoss), on_features),
    "koleo, across": Case(
        plain(KoLeoLoss, across_processes=True),
        on_some_rows,
    ),
    "gram": Case(plain(GramAnchoringLoss), on_features),
    "gram, same places": Case(
        plain(GramAnchoringLoss), lambda loss, x: loss(x.s_features, x.t_features)
    ),
    "patch order": Case(
        plain(PatchOrderLoss, student_steepness=20.0, teacher_steepness=20.0),
        lambda loss, x: loss(
            x.s_features[0], x.t_features[1], torch.eye(D, dtype=torch.float64), matches(x)[0, 1]
        ),
    ),
    "vicreg": Case(plain(VICRegLoss), lambda loss, x: loss(x.s_cls)),
    "vicregl": Case(
        plain(VICRegLLoss),
        lambda loss, x: loss(x.s_cls, x.s_features, matches(x), [compact(x)]).loss,
    ),
    "layers, moco": Case(plain(layered, MocoV3Objective, detach_targets=False), on_layers),
    "layers, byol": Case(plain(layered, ByolObjective, detach_targets=False), on_layers),
    "layers, simclr": Case(plain(layered, SimclrObjective), on_layers),
    "token layers, moco": Case(
        plain(layered, MocoV3Objective, detach_targets=False), on_token_layers
    ),
    "token layers, byol": Case(plain(layered, ByolObjective), on_token_layers),
    "token layers, simclr": Case(plain(layered, SimclrObjective), on_token_layers),
    "recipe dino": Case(plain(dino, C), call_step),
    "recipe glsd": Case(plain(glsd, C), call_step),
    "recipe esvit": Case(plain(esvit, C), call_step),
    "recipe ibot": Case(
        plain(ibot, C), lambda loss, x: loss(*both(x), [*x.masked[:2], None], teacher_temp=0.1).loss
    ),
    "recipe densecl": Case(plain(densecl, D, num_keys=11), call_wide_step),
    "recipe pixpro": Case(plain(pixpro, D, instance_weight=1.0), call_wide_step),
    "recipe pixpro, legacy": Case(plain(pixpro, D, legacy=True), call_wide_step),
    "recipe vicregl": Case(
        plain(vicregl, location_counts=(3, 2), feature_counts=(3, 2)), call_vicregl
    ),
    "recipe vicregl, legacy": Case(plain(vicregl, feature_counts=None, legacy=True), call_vicregl),
    "recipe croc": Case(plain(headed, croc, C, C, **OF_IMAGES), call_croc),
    "recipe cribo": Case(plain(headed, tiny_cribo), call_cribo),
    "recipe cribo, legacy": Case(plain(headed, tiny_cribo, legacy=True), call_cribo),
    "recipe adasim": Case(plain(adasim, 2 * TOTAL, D, C, top_k=3, votes=2), call_adasim),
    "recipe sdssl_moco": Case(sdssl(sdssl_moco), call_sdssl),
    "recipe sdssl_byol": Case(sdssl(sdssl_byol), call_sdssl),
    "recipe sdssl_byol, legacy": Case(sdssl(sdssl_byol, legacy=True), call_first_sdssl),
    "recipe sdssl_simclr": Case(sdssl(sdssl_simclr), call_sdssl),
}


# What stays within a process.
WITHIN = {
    "koleo": Case(plain(KoLeoLoss), on_some_rows),
    "gram, batch": Case(plain(GramAnchoringLoss, scope="batch"), on_features),
    "simclr, legacy": Case(
        plain(SimclrObjective, legacy=True),
        lambda loss, x: loss(x.s_cls[:2], [view[:, 0] for view in x.s_layers]),
    ),
}
