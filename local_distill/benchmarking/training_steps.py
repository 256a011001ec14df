"""The suite of whole training steps: what local distillation adds to one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from local_distill.benchmarking.cases import Case, Settings, Way, Work
from local_distill.benchmarking.sizes import SIZES, Size, check_sizes, step
from local_distill.errors import ConfigError
from local_distill.heads import ProjectionHead
from local_distill.losses.global_distillation import GlobalDistillationLoss
from local_distill.losses.local_distillation import LocalDistillationLoss
from local_distill.matching.match_views import match_views
from local_distill.matching.nearest import NearestMatcher
from local_distill.matching.similarity import SimilarityMatcher
from local_distill.structures import Matcher, Matches, Tokens
from local_distill.targets.centering import Centering

__all__ = ["training_step_cases"]

_STUDENT_TEMP, _TEACHER_TEMP = 0.1, 0.04
# timm's name, and how many blocks it has
_MODELS = {
    "S/16": ("vit_small_patch16_224", 12),
    "S/8": ("vit_small_patch8_224", 12),
    "L/14": ("vit_large_patch14_dinov2", 24),
}
# What `quick` trains: patches of 8 px, views of 48 and 24 px.
_QUICK, _QUICK_BLOCKS = Size(6, 3, 96, 48, 24), 3

Pair = tuple[int, int]


def training_step_cases(settings: Settings) -> Iterator[Case]:
    """One step each size: the networks forward and backward, without an optimiser.

    Ways: the global loss alone (the reference); with the local loss as the published codes have it,
    from tables of logits, and from `PrototypeLogits`; and the latter with similarity in the place
    of geometry. So a ratio less 1 is what local distillation adds to a step without it.

    Raises:
        MissingExtraError: timm is not installed.
        ConfigError: a size of another network than a ViT, or a matcher.
    """
    from local_distill.backbones import TimmBackbone, tiny_vit

    if settings.matchers:
        raise ConfigError("the `step` suite takes no `--matcher`; the `matchers` suite does")
    for name in check_sizes(settings.sizes or ("S/16",)):
        if name not in _MODELS:
            raise ConfigError(f"the `step` suite has no size {name!r}; it has {', '.join(_MODELS)}")
        torch.manual_seed(0)
        if settings.quick:
            yield _case("tiny", _QUICK, tiny_vit(), _QUICK_BLOCKS, settings)
        else:
            model, blocks = _MODELS[name]
            yield _case(name, SIZES[name], TimmBackbone(model), blocks, settings)


def _case(name: str, size: Size, backbone: nn.Module, blocks: int, settings: Settings) -> Case:
    trained = _Trained(size, backbone, settings)
    work = _work(size, blocks, settings)
    ways: dict[str, Way] = {
        "global loss alone": trained.way(_without_local),
        "published form": trained.way(_plain_pairs, NearestMatcher()),
        "tables of logits": trained.way(_tables, NearestMatcher()),
        "PrototypeLogits": trained.way(_products, NearestMatcher()),
        "PrototypeLogits, similarity": trained.way(_products, SimilarityMatcher()),
    }
    title = f"{name}, b = {settings.batch}, c = {settings.prototypes}"
    return Case("step", title, ways, "global loss alone", work, trained.check)


class _Trained:
    """A student, a teacher, and the views of a step."""

    def __init__(self, size: Size, backbone: nn.Module, settings: Settings) -> None:
        self.prototypes = settings.prototypes
        hidden, bottleneck = _head_widths(settings)

        def heads() -> dict[str, ProjectionHead]:
            made = {}
            for name in ("global", "local"):
                head = ProjectionHead(
                    size.features,
                    settings.prototypes,
                    hidden_dim=hidden,
                    bottleneck_dim=bottleneck,
                )
                made[name] = head.to(settings.device, settings.dtype)
            return made

        self.backbone = backbone.to(settings.device, settings.dtype)
        self.student, self.teacher = heads(), heads()
        made = step(size, settings.batch, device=settings.device, dtype=settings.dtype)
        self.pairs = made.pairs
        self.places = [view._replace(features=None) for view in made.student]
        self.views = [
            torch.randn(
                settings.batch,
                3,
                *(int(side) for side in view.geometry.view_size[0]),
                device=settings.device,
                dtype=settings.dtype,
            )
            for view in made.student
            if view.geometry is not None
        ]

    def way(self, loss: _Loss, matcher: Matcher | None = None) -> Way:
        """Forward, loss, and the gradient of all parameters."""

        def run() -> tuple[Tensor, ...]:
            value, parameters = self.loss(loss, matcher)
            return torch.autograd.grad(value, parameters, allow_unused=True)

        return run

    def loss(self, loss: _Loss, matcher: Matcher | None) -> tuple[Tensor, list[nn.Parameter]]:
        """The loss of the step, and what it is differentiated in."""
        student = self._features(self.views)
        with torch.no_grad():
            teacher = self._features(self.views[:2])
        matches = {} if matcher is None else self._matches(matcher, student, teacher)
        heads = ("global",) if matcher is None else ("global", "local")
        parameters = [p for p in self.backbone.parameters() if p.requires_grad]
        for name in heads:
            parameters += [p for p in self.student[name].parameters() if p.requires_grad]
        return loss(self, student, teacher, matches), parameters

    def _features(self, views: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """(b, d) and (b, n, d) of each view; those of one size go through together."""
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for group in (range(2), range(2, len(views))):
            if len(group):
                out = self.backbone(torch.cat([views[v] for v in group]))
                parts = (part.chunk(len(group)) for part in (out.global_token, out.patch_tokens))
                found.update(zip(group, zip(*parts, strict=True), strict=True))
        return [found[v] for v in range(len(views))]

    def _matches(
        self,
        matcher: Matcher,
        student: Sequence[tuple[Tensor, Tensor]],
        teacher: Sequence[tuple[Tensor, Tensor]],
    ) -> dict[Pair, Matches]:
        ours, theirs = (
            [
                Tokens(tokens.detach(), place.geometry, place.grid)
                for (_, tokens), place in zip(side, self.places, strict=False)
            ]
            for side in (student, teacher)
        )
        return match_views(matcher, ours, theirs, self.pairs)

    def check(self) -> None:
        """The three forms of the local loss are one loss."""
        values = [
            float(self.loss(form, NearestMatcher())[0].detach())
            for form in (_plain_pairs, _tables, _products)
        ]
        if max(values) - min(values) > 1e-3 * max(values):
            raise AssertionError(f"the forms of the local loss give {values}")


_Features = Sequence[tuple[Tensor, Tensor]]
_Loss = Callable[[_Trained, _Features, _Features, Mapping[Pair, Matches]], Tensor]


def _without_local(
    trained: _Trained, student: _Features, teacher: _Features, matches: Mapping[Pair, Matches]
) -> Tensor:
    return _global_loss(trained, student, teacher)


def _global_loss(trained: _Trained, student: _Features, teacher: _Features) -> Tensor:
    loss = _new_loss(GlobalDistillationLoss, trained)
    ours, theirs = trained.student["global"], trained.teacher["global"]
    with torch.no_grad():
        targets = [theirs(whole) for whole, _ in teacher]
    value: Tensor = loss([ours(whole) for whole, _ in student], targets, teacher_temp=_TEACHER_TEMP)
    return value


def _plain_pairs(
    trained: _Trained, student: _Features, teacher: _Features, matches: Mapping[Pair, Matches]
) -> Tensor:
    """A softmax for each teacher view; a log-softmax and a gather for each pair."""
    ours, theirs = trained.student["local"], trained.teacher["local"]
    logits = [ours(tokens) for _, tokens in student]
    with torch.no_grad():
        probs = [(theirs(tokens).float() / _TEACHER_TEMP).softmax(-1) for _, tokens in teacher]
    total = torch.zeros((), device=logits[0].device)
    for (v, q), found in matches.items():
        target = probs[q].gather(1, found.teacher_index.expand(-1, -1, trained.prototypes))
        cross = -(target * (logits[v].float() / _STUDENT_TEMP).log_softmax(-1)).sum(-1)
        weight = found.weight[..., 0]
        total = total + (cross * weight).sum() / weight.sum().clamp_min(1e-9)
    return _global_loss(trained, student, teacher) + total / len(matches)


def _tables(
    trained: _Trained, student: _Features, teacher: _Features, matches: Mapping[Pair, Matches]
) -> Tensor:
    loss = _new_loss(LocalDistillationLoss, trained)
    ours, theirs = trained.student["local"], trained.teacher["local"]
    with torch.no_grad():
        targets = [theirs(tokens) for _, tokens in teacher]
    logits = [ours(tokens) for _, tokens in student]
    value: Tensor = loss(logits, targets, matches, teacher_temp=_TEACHER_TEMP)
    return _global_loss(trained, student, teacher) + value


def _products(
    trained: _Trained, student: _Features, teacher: _Features, matches: Mapping[Pair, Matches]
) -> Tensor:
    loss = _new_loss(LocalDistillationLoss, trained)
    with torch.no_grad():
        targets = trained.teacher["local"].prototype_logits([tokens for _, tokens in teacher])
    logits = trained.student["local"].prototype_logits([tokens for _, tokens in student])
    value: Tensor = loss(logits, targets, matches, teacher_temp=_TEACHER_TEMP)
    return _global_loss(trained, student, teacher) + value


def _new_loss(kind: Callable[..., nn.Module], trained: _Trained) -> nn.Module:
    """With a center of its own, so that every call does the same; it stays at zero for `check`."""
    device = trained.views[0].device
    return kind(Centering(trained.prototypes), student_temp=_STUDENT_TEMP).to(device)


def _head_widths(settings: Settings) -> tuple[int, int]:
    """Of the hidden layers and of the bottleneck."""
    return (64, 32) if settings.quick else (2048, 256)


def _work(size: Size, blocks: int, settings: Settings) -> Work:
    """Products alone: about 12 d² weights a block, attention, the local and the global head.

    The student's forward and backward are three products, the teacher's forward one. Bytes: images
    and tokens are few beside the networks' parameters, which are read once, and their gradient.
    """
    d, c = size.features, settings.prototypes
    hidden, bottleneck = _head_widths(settings)
    weights = 12 * d * d * blocks
    head = d * hidden + hidden * hidden + hidden * bottleneck + bottleneck * c
    made = step(size, 1, device="cpu", dtype=settings.dtype)
    flops = 0.0
    for views, passes in ((made.student, 3), (made.teacher, 1)):
        for view in views:
            n = view.num_tokens + 1  # with the class token, which the global head takes
            attention = 4 * n * n * d * blocks
            flops += passes * settings.batch * (2 * n * (weights + head) + attention)
    # two networks, and the gradient of one
    return Work(flops, float(3 * (weights + 2 * head) * settings.dtype.itemsize))
