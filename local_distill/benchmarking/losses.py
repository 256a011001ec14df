"""The suite `losses`: forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from local_distill.benchmarking.cases import Case, Settings, Way, Work
from local_distill.benchmarking.others import installed
from local_distill.benchmarking.plain_forms import (
    plain_global_loss,
    plain_koleo_loss,
    plain_local_loss,
    plain_vicreg_loss,
)
from local_distill.benchmarking.sizes import Step, named_size, step
from local_distill.benchmarking.work import loss_from_logits_work, loss_from_prototypes_work
from local_distill.losses.global_distillation import GlobalDistillationLoss
from local_distill.losses.koleo import KoLeoLoss
from local_distill.losses.local_distillation import LocalDistillationLoss
from local_distill.losses.variance_covariance import VICRegLoss
from local_distill.matching.match_views import match_views
from local_distill.matching.nearest import NearestMatcher
from local_distill.structures import Matches, PrototypeLogits
from local_distill.targets.centering import Centering

__all__ = ["loss_cases"]

_DEFAULT_SIZES = ("Swin",)
_STUDENT_TEMP, _TEACHER_TEMP = 0.1, 0.04
_BOTTLENECK = 256  # features that the prototypes take, DINO's
_EMBEDDING = 2048  # a quarter of VICReg's, which takes a CPU seconds
_PLAIN = "plain"
# The centers are updated, and all but stand still: every call is the same question.
_STILL = 1 - 1e-9


def loss_cases(settings: Settings) -> Iterator[Case]:
    """The local loss, from logits and from features, for each size; then those of whole views."""
    names = settings.sizes or _DEFAULT_SIZES
    for name in names:
        size = named_size(name)._replace(features=1)  # places alone are wanted
        made = step(size, settings.batch, device=settings.device).without_features()
        label = f"{name}, b = {settings.batch}, {settings.prototypes} prototypes"
        yield _from_logits(f"{label}: local loss from logits", made, settings)
        yield _from_prototypes(f"{label}: local loss from features", made, settings)
    label = f"b = {settings.batch}"
    yield _global(f"{label}, {settings.prototypes} prototypes: global loss", settings)
    if settings.batch < 2:
        return  # the rest compares images with each other
    width = named_size(names[0]).features
    yield _koleo(f"{label}, {width} features: KoLeo", width, settings)
    width = _EMBEDDING // 8 if settings.quick else _EMBEDDING
    yield _vicreg(f"{label}, {width} features: VICReg", width, settings)


def _from_logits(name: str, made: Step, settings: Settings) -> Case:
    matches = match_views(NearestMatcher(), made.student, made.teacher, made.pairs)
    c, draw = settings.prototypes, _Draw(settings)
    student = [draw(settings.batch, view.num_tokens, c, learns=True) for view in made.student]
    teacher = [draw(settings.batch, view.num_tokens, c) for view in made.teacher]
    loss = LocalDistillationLoss(Centering(c, momentum=_STILL), student_temp=_STUDENT_TEMP).to(
        settings.device
    )
    ways: dict[str, Callable[[], Tensor]] = {
        _PLAIN: lambda: _plain_local(student, teacher, matches),
        "LocalDistillationLoss": lambda: loss(
            student, teacher, matches, teacher_temp=_TEACHER_TEMP
        ),
    }
    work = loss_from_logits_work(*_row_counts(made, settings.batch), c, settings.dtype)
    return _case(name, ways, student, work)


def _from_prototypes(name: str, made: Step, settings: Settings) -> Case:
    matches = match_views(NearestMatcher(), made.student, made.teacher, made.pairs)
    c, draw = settings.prototypes, _Draw(settings)
    b, d = settings.batch, _BOTTLENECK
    student = [draw.unit(b, view.num_tokens, d, learns=True) for view in made.student]
    teacher = [draw.unit(b, view.num_tokens, d) for view in made.teacher]
    weight, teacher_weight = draw.unit(c, d, learns=True), draw.unit(c, d)
    loss = LocalDistillationLoss(Centering(c, momentum=_STILL), student_temp=_STUDENT_TEMP).to(
        settings.device
    )

    def logits() -> tuple[list[Tensor], list[Tensor]]:
        return [z @ weight.T for z in student], [x @ teacher_weight.T for x in teacher]

    ways: dict[str, Callable[[], Tensor]] = {
        _PLAIN: lambda: _plain_local(*logits(), matches),
        "LocalDistillationLoss on the product": lambda: loss(
            *logits(), matches, teacher_temp=_TEACHER_TEMP
        ),
        "LocalDistillationLoss on PrototypeLogits": lambda: loss(
            [PrototypeLogits(z, weight) for z in student],
            [PrototypeLogits(x, teacher_weight) for x in teacher],
            matches,
            teacher_temp=_TEACHER_TEMP,
        ),
    }
    work = loss_from_prototypes_work(*_row_counts(made, b), c, d, settings.dtype)
    return _case(name, ways, [*student, weight], work)


def _global(name: str, settings: Settings) -> Case:
    views, teacher_views, c = 10, 2, settings.prototypes
    draw = _Draw(settings)
    student = [draw(settings.batch, c, learns=True) for _ in range(views)]
    teacher = [draw(settings.batch, c) for _ in range(teacher_views)]
    pairs = [(v, q) for v in range(views) for q in range(teacher_views) if v != q]
    loss = GlobalDistillationLoss(Centering(c, momentum=_STILL), student_temp=_STUDENT_TEMP).to(
        settings.device
    )
    ways: dict[str, Callable[[], Tensor]] = {
        _PLAIN: lambda: plain_global_loss(student, teacher, pairs, _STUDENT_TEMP, _TEACHER_TEMP),
        "GlobalDistillationLoss": lambda: loss(student, teacher, teacher_temp=_TEACHER_TEMP),
    }
    lightly = installed("lightly.loss")
    if lightly is not None:
        theirs = lightly.DINOLoss(c, student_temp=_STUDENT_TEMP, center_momentum=_STILL).to(
            settings.device, settings.dtype
        )
        ways["Lightly DINOLoss"] = lambda: theirs(teacher, student, teacher_temp=_TEACHER_TEMP)
    b = settings.batch
    work = loss_from_logits_work(b * views, b * teacher_views, b * len(pairs), c, settings.dtype)
    return _case(name, ways, student, work)


def _koleo(name: str, width: int, settings: Settings) -> Case:
    features = _Draw(settings)(settings.batch, width, learns=True)
    ours = KoLeoLoss()
    ways: dict[str, Callable[[], Tensor]] = {
        _PLAIN: lambda: plain_koleo_loss(features),
        "KoLeoLoss": lambda: ours(features),
    }
    lightly = installed("lightly.loss")
    if lightly is not None:
        theirs = lightly.KoLeoLoss()
        ways["Lightly KoLeoLoss"] = lambda: theirs(features)
    work = Work(2.0 * settings.batch**2 * width, 2.0 * features.nbytes)
    return _case(name, ways, [features], work)


def _vicreg(name: str, width: int, settings: Settings) -> Case:
    draw = _Draw(settings)
    views = [draw(settings.batch, width, learns=True) for _ in range(2)]
    # twice the covariance term, as VICReg's and Lightly's code add the two views'
    ours = VICRegLoss(covariance_weight=2.0)
    ways: dict[str, Callable[[], Tensor]] = {
        _PLAIN: lambda: plain_vicreg_loss(views),
        "VICRegLoss": lambda: ours(views),
    }
    lightly = installed("lightly.loss")
    if lightly is not None:
        theirs = lightly.VICRegLoss()
        ways["Lightly VICRegLoss"] = lambda: theirs(*views)
    # One product of each view forward and one backward, of the smaller of (b, b) and (d, d):
    # both have the same sum of squares.
    smaller = min(settings.batch, width)
    flops = 2 * 2 * (2.0 * settings.batch * width * smaller)
    return _case(name, ways, views, Work(flops, 2.0 * sum(view.nbytes for view in views)))


def _plain_local(
    student: Sequence[Tensor], teacher: Sequence[Tensor], matches: dict[tuple[int, int], Matches]
) -> Tensor:
    return plain_local_loss(student, teacher, matches, _STUDENT_TEMP, _TEACHER_TEMP)


def _row_counts(made: Step, batch: int) -> tuple[int, int, int]:
    student = sum(view.num_tokens for view in made.student)
    teacher = sum(view.num_tokens for view in made.teacher)
    answered = sum(made.student[v].num_tokens for v, _ in made.pairs)
    return batch * student, batch * teacher, batch * answered


class _Draw:
    """Random inputs on the device."""

    def __init__(self, settings: Settings) -> None:
        self.device, self.dtype = settings.device, settings.dtype
        self.generator = torch.Generator(self.device).manual_seed(0)

    def __call__(self, *shape: int, learns: bool = False) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, device=self.device, dtype=self.dtype)
        return drawn.requires_grad_(learns)

    def unit(self, *shape: int, learns: bool = False) -> Tensor:
        """Rows of length 1."""
        return torch.nn.functional.normalize(self(*shape), dim=-1).requires_grad_(learns)


def _case(
    name: str, losses: dict[str, Callable[[], Tensor]], inputs: Sequence[Tensor], work: Work
) -> Case:
    """Forward and backward of each; that all say the same is checked first."""

    def trained(loss: Callable[[], Tensor]) -> Way:
        return lambda: torch.autograd.grad(loss(), inputs)

    def check() -> dict[str, str]:
        wanted, found = _value(losses[_PLAIN]), {}
        most = (0.05 if inputs[0].itemsize < 4 else 1e-3) * abs(wanted)
        for way, loss in losses.items():
            try:
                value = _value(loss)
            except Exception:  # has failed before, and its row says why
                continue
            if not abs(value - wanted) <= most:
                found[way] = f"gives {value:.6g}, {_PLAIN} {wanted:.6g}"
        return found

    ways = {way: trained(loss) for way, loss in losses.items()}
    return Case("losses", name, ways, _PLAIN, work, check)


def _value(loss: Callable[[], Tensor]) -> float:
    with torch.no_grad():
        return float(loss())
