"""Losses that are wrong in one way each, by the property that is there to see it."""

import math
from typing import NamedTuple

import torch
from torch import nn

from local_distill import (
    Centering,
    GlobalDistillationLoss,
    LocalDistillationLoss,
    local_distillation_loss,
)


class Step(NamedTuple):
    students: list
    teachers: list
    matches: dict
    temp: float
    valid: list | None


class Right(LocalDistillationLoss):
    """A right loss with places to spoil it. Every token has its own weight in the mean over all."""

    targets_class = Centering

    def __init__(self, c):
        super().__init__(self.targets_class(c), normalize="all")

    def forward(self, student_logits, teacher_logits, matches, *, teacher_temp, teacher_valid=None):
        step = Step(student_logits, teacher_logits, matches, teacher_temp, teacher_valid)
        step = self.before(step)
        value = super().forward(*step[:3], teacher_temp=step.temp, teacher_valid=step.valid)
        return self.after(value, step)

    def before(self, step):
        return step

    def after(self, value, step):
        return value


class RowsScaled(Right):
    """The tokens' weights are multiplied with numbers that a right loss would not look at."""

    def before(self, step):
        scaled = {
            pair: found._replace(weight=found.weight * self.scale(pair, found, step)[..., None])
            for pair, found in step.matches.items()
            if all(0 <= view < len(views) for view, views in zip(pair, step[:2], strict=True))
        }
        return step._replace(matches={**step.matches, **scaled})

    def gathered(self, pair, found, step):
        probs = self.targets(step.teachers, teacher_temp=step.temp)[pair[1]].probs()
        inside = found.teacher_index.long().clamp(0, probs.shape[1] - 1)
        return found._replace(teacher_index=inside).gather(probs)


WRONG = {}


def caught_by(name):
    """Register a loss as the one that only this property sees."""

    def register(kind):
        assert name not in WRONG
        WRONG[name] = kind
        return kind

    return register


def wide(values):
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def rows(found):
    """(b, s) zeros that belong to the matches."""
    return found.weight.sum(-1) * 0


# contract


@caught_by("returns_a_finite_scalar")
class OneAxis(Right):
    def after(self, value, step):
        return value[None]


@caught_by("float64_stays_float64")
class RoundsWhatIsOnlyLogged(Right):
    def after(self, value, step):
        return value.float() if self.training and not value.requires_grad else value


@caught_by("the_same_state_gives_the_same")
class Noisy(Right):
    def after(self, value, step):
        return value * (1 + 5e-6 * torch.rand((), device=value.device)) if self.training else value


@caught_by("inputs_are_left_alone")
class WritesIntoTheMatches(Right):
    def after(self, value, step):
        for found in step.matches.values():
            if found.cost.is_contiguous():
                found.cost.fill_(0.0)
        return value


@caught_by("layout_does_not_matter")
class WantsContiguousLogits(Right):
    def after(self, value, step):
        for logits in step.students:
            if logits is not None:
                logits.view(-1)
        return value


@caught_by("new_tensors_follow_the_inputs_device")
class NewTensorOnTheDefaultDevice(Right):
    def after(self, value, step):
        return value + torch.zeros(())


@caught_by("inference_mode_works")
class WritesIntoTheTeacher(Right):
    def after(self, value, step):
        for logits in step.teachers:
            if logits.is_contiguous() and not logits.requires_grad:
                logits.add_(0)
        return value


@caught_by("pairs_are_averaged")
class PairsAreSummed(Right):
    def after(self, value, step):
        return value * len(step.matches)


@caught_by("default_pairs_are_those_of_different_views")
class AllPairs(GlobalDistillationLoss):
    def __init__(self, c):
        super().__init__(Centering(c))

    def forward(self, student_logits, teacher_logits, *, teacher_temp, pairs=None):
        if pairs is None:
            shape = len(student_logits), len(teacher_logits)
            pairs = [(v, q) for v in range(shape[0]) for q in range(shape[1])]
        return super().forward(
            student_logits, teacher_logits, teacher_temp=teacher_temp, pairs=pairs
        )


@caught_by("views_without_a_pair_may_be_none")
class WantsEveryView(Right):
    def after(self, value, step):
        assert all(logits.dim() == 3 for logits in step.students)
        return value


# gradients


@caught_by("the_teacher_receives_no_gradient")
class TeacherNotDetached(Right):
    def after(self, value, step):
        for logits in step.teachers:
            value = value + (logits - logits.detach()).nan_to_num().sum()
        return value


@caught_by("every_matched_token_learns")
class DropsTheLighterTokens(RowsScaled):
    def scale(self, pair, found, step):
        mass = found.weight.sum(-1)
        mean = mass.sum() / (mass > 0).sum().clamp_min(1)
        return (mass >= mean).to(mass.dtype)


@caught_by("gradients_agree_with_finite_differences")
class GradientDoubled(Right):
    def after(self, value, step):
        return 2 * value - value.detach()


@caught_by("the_target_is_the_minimum")
class OtherTeacherTemperature(Right):
    def before(self, step):
        return step._replace(temp=step.temp * 2)


@caught_by("images_learn_apart")
class HardPairsWeighMore(Right):
    def forward(self, student_logits, teacher_logits, matches, *, teacher_temp, teacher_valid=None):
        targets = self.targets(teacher_logits, teacher_temp=teacher_temp)
        value = super().forward(
            student_logits,
            teacher_logits,
            matches,
            teacher_temp=teacher_temp,
            teacher_valid=teacher_valid,
        )
        for (v, q), found in matches.items():
            own = local_distillation_loss(student_logits[v], targets[q], found, normalize="all")
            value = value + 0.05 * own**2 / len(matches)
        return value


# symmetries


@caught_by("shifts_of_student_logits_do_not_matter")
class SizeOfLogitsCosts(Right):
    def after(self, value, step):
        for (v, _), found in step.matches.items():
            mass = found.weight.sum(-1)
            logits = torch.where((mass > 0)[..., None], step.students[v], 0.0)
            logits = wide(logits)
            if logits.shape[-1] > 1:
                size = (mass * (logits / 0.1).logsumexp(-1) ** 2).sum()
                value = value + 1e-3 * size / max(1, mass.numel()) / len(step.matches)
        return value


@caught_by("order_of_prototypes_does_not_matter")
class LaterPrototypesWeighMore(RowsScaled):
    def scale(self, pair, found, step):
        mixed = self.gathered(pair, found, step)
        return 0.5 + 0.5 * mixed.argmax(-1) / mixed.shape[-1]


@caught_by("order_of_images_does_not_matter")
class LaterImagesWeighMore(RowsScaled):
    def scale(self, pair, found, step):
        zeros = rows(found)
        return zeros + torch.arange(1, len(zeros) + 1, device=zeros.device)[:, None] / 3


@caught_by("order_of_views_does_not_matter")
class LaterViewsWeighLess(RowsScaled):
    def scale(self, pair, found, step):
        return rows(found) + 1 / (1 + pair[0] + 2 * pair[1])


@caught_by("order_of_student_tokens_does_not_matter")
class LaterTokensWeighMore(RowsScaled):
    def scale(self, pair, found, step):
        zeros = rows(found)
        return zeros + 0.1 * torch.arange(1, zeros.shape[1] + 1, device=zeros.device)


@caught_by("order_of_teacher_tokens_does_not_matter")
class LaterTeacherTokensWeighMore(RowsScaled):
    def scale(self, pair, found, step):
        read = torch.where(found.weight > 0, found.teacher_index, 0)
        return rows(found) + 1.0 + read.amax(-1)


@caught_by("order_of_candidates_does_not_matter")
class FirstCandidateCountsTwice(RowsScaled):
    def scale(self, pair, found, step):
        first = found._replace(
            teacher_index=found.teacher_index[..., :1],
            weight=(found.weight[..., :1] > 0).to(found.weight.dtype),
        )
        return 0.5 + 0.5 * self.gathered(pair, first, step).amax(-1)


@caught_by("candidates_of_no_weight_do_not_matter")
class CountsEmptyCandidates(RowsScaled):
    def scale(self, pair, found, step):
        return 1.0 + 0.1 * (found.weight == 0).sum(-1)


@caught_by("a_candidate_may_come_in_two_halves")
class PrefersOneCandidate(RowsScaled):
    def scale(self, pair, found, step):
        total = found.weight.sum(-1).clamp_min(1e-6)
        return 0.5 + 0.5 * (found.weight**2).sum(-1) / total**2


# tokens without a match


@caught_by("unmatched_student_tokens_do_not_matter")
class UnmatchedTokensAreFlattened(Right):
    def after(self, value, step):
        for (v, _), found in step.matches.items():
            logits = step.students[v]
            free = ~found.matched & found.matched.any(-1, keepdim=True)
            free = free & logits.isfinite().all(-1)
            z = wide(torch.where(free[..., None], logits, 0.0)) / 0.1
            peaks = torch.where(free, z.logsumexp(-1) - z.mean(-1), 0.0).sum()
            value = value + 1e-2 * peaks / max(1, free.numel()) / len(step.matches)
        return value


@caught_by("unmatched_student_tokens_may_be_nan")
class MasksTooLate(Right):
    def after(self, value, step):
        for (v, _), found in step.matches.items():
            value = value + (step.students[v] * (~found.matched * 0.0)[..., None]).sum()
        return value


@caught_by("unreferenced_teacher_tokens_may_be_nan")
class ReadsEveryTeacherToken(Right):
    def after(self, value, step):
        for logits in step.teachers:
            value = value + 0.0 * wide(logits.detach()).sum()
        return value


@caught_by("a_step_without_matches_costs_nothing")
class DividesByNoMass(Right):
    def after(self, value, step):
        for found in step.matches.values():
            if found.weight.numel():
                value = torch.where((found.weight > 0).any(), value, torch.nan)
        return value


# state


@caught_by("evaluation_leaves_the_state_alone")
class LearnsInEvaluation(Right):
    def after(self, value, step):
        if not self.training and torch.is_grad_enabled():
            self.targets.update(step.teachers, step.valid)
        return value


@caught_by("no_grad_leaves_the_state_alone")
class LearnsWithoutGrad(Right):
    def after(self, value, step):
        if self.training and not torch.is_grad_enabled():
            self.targets.update(step.teachers, step.valid)
        return value


class UpdatedBeforeUse(Centering):
    def forward(self, teacher_logits, *, teacher_temp, valid=None):
        made = super().forward(teacher_logits, teacher_temp=teacher_temp, valid=valid)
        if self.training and torch.is_grad_enabled():
            super().update(teacher_logits, valid)
            made = super().forward(teacher_logits, teacher_temp=teacher_temp, valid=valid)
        return made

    def update(self, teacher_logits, valid=None):
        pass


@caught_by("the_state_moves_after_use")
class LearnsBeforeUse(Right):
    targets_class = UpdatedBeforeUse


class Unguarded(Centering):
    def update(self, teacher_logits, valid=None):
        super().update(teacher_logits, valid)
        for view, logits in enumerate(teacher_logits):
            keep = True if valid is None else valid[view][..., None]
            good = torch.where(keep | logits.isfinite(), logits, 0.0).isfinite().all()
            self.center.copy_(torch.where(good, self.center, torch.nan))


@caught_by("a_nan_teacher_never_enters_the_state")
class TakesNanIn(Right):
    targets_class = Unguarded


class CenterNotSaved(Centering):
    def __init__(self, c):
        super().__init__(c)
        del self.center
        self.register_buffer("center", torch.zeros(c), persistent=False)


@caught_by("a_checkpoint_goes_on_alike")
class ForgetsTheCenter(Right):
    targets_class = CenterNotSaved


@caught_by("a_copy_learns_for_itself")
class CopiesShareTargets(Right):
    def __deepcopy__(self, memo):
        other = type(self)(self.targets.num_prototypes)
        other.targets = self.targets
        return other


class RoundedCenter(Centering):
    _apply = nn.Module._apply


@caught_by("casting_does_not_round_the_state")
class CenterIsCast(Right):
    targets_class = RoundedCenter


@caught_by("teacher_tokens_that_are_not_valid_stay_out")
class IgnoresValid(Right):
    def before(self, step):
        return step._replace(valid=None)


# numbers


@caught_by("half_precision_logits_agree_with_float32")
class DividesInBfloat16(Right):
    def before(self, step):
        students = step.students
        if not isinstance(students, torch.Tensor):
            students = [
                x / 0.3 * 0.3 if x is not None and x.dtype == torch.bfloat16 else x
                for x in students
            ]
        return step._replace(students=students)


@caught_by("float32_agrees_with_float64")
class RoundsTheLoss(Right):
    def after(self, value, step):
        return value.bfloat16().float() if value.dtype == torch.float32 else value


@caught_by("autocast_changes_nothing")
class MultipliesUnderAutocast(Right):
    def after(self, value, step):
        one = value.new_full((1, 1), 1.01) @ value.new_full((1, 1), 1 / 1.01)
        return value * one[0, 0].to(value.dtype)


@caught_by("large_logits_stay_finite")
class ExponentialsOverflow(Right):
    def after(self, value, step):
        for (v, _), found in step.matches.items():
            logits = wide(torch.where(found.matched[..., None], step.students[v], 0.0))
            value = value + 0.0 * (logits / 0.1).exp().sum()
        return value


@caught_by("one_prototype_costs_nothing")
class DividesByTheEntropyOfOne(Right):
    def after(self, value, step):
        most = math.log(self.targets.num_prototypes)
        return value * (most / most if most else math.nan)


@caught_by("an_empty_batch_costs_nothing")
class MeanOfNoImages(Right):
    def after(self, value, step):
        return value if len(step.teachers[0]) else value * math.nan


@caught_by("compiles_without_graph_breaks")
class LooksAtTheValue(Right):
    def after(self, value, step):
        if value.item() > 1e30:
            value = value * 0
        return value


# bad input


@caught_by("batches_that_differ_are_refused")
class BroadcastsBatches(Right):
    def before(self, step):
        if not isinstance(step.teachers, list) or not isinstance(step.students, list):
            return step
        known = [x for x in (*step.students, *step.teachers) if x is not None]
        b = max(len(x) for x in known)

        def widen(x):
            return x.expand(b, *x.shape[1:]) if x is not None and len(x) == 1 else x

        return step._replace(
            students=[widen(x) for x in step.students], teachers=[widen(x) for x in step.teachers]
        )


@caught_by("prototypes_that_differ_are_refused")
class BroadcastsPrototypes(Right):
    def before(self, step):
        c = self.targets.num_prototypes
        if not isinstance(step.teachers, list) or not isinstance(step.students, list):
            return step

        def widen(x):
            return x.expand(*x.shape[:-1], c) if x is not None and x.shape[-1] == 1 else x

        return step._replace(
            students=[widen(x) for x in step.students], teachers=[widen(x) for x in step.teachers]
        )


@caught_by("bare_tensors_are_refused")
class CutsTensorsIntoViews(Right):
    def before(self, step):
        return step._replace(students=list(step.students), teachers=list(step.teachers))


@caught_by("integer_logits_are_refused")
class CastsIntegers(Right):
    def before(self, step):
        if isinstance(step.students, torch.Tensor) or isinstance(step.teachers, torch.Tensor):
            return step
        made = [
            [x if x is None or x.is_floating_point() else x.float() for x in views]
            for views in step[:2]
        ]
        return step._replace(students=made[0], teachers=made[1])


@caught_by("temperatures_must_be_above_zero")
class ClampsTemperatures(Right):
    def before(self, step):
        return step._replace(temp=max(step.temp, 1e-3))


@caught_by("views_that_are_not_there_are_refused")
class CountsViewsFromTheEnd(Right):
    def before(self, step):
        counts = len(step.students), len(step.teachers)
        renamed = {(v % counts[0], q % counts[1]): m for (v, q), m in step.matches.items()}
        return step._replace(matches=renamed)


@caught_by("matches_of_other_tokens_are_refused")
class ClampsIndices(Right):
    def before(self, step):
        inside = {
            (v, q): m._replace(
                teacher_index=m.teacher_index.clamp_max(step.teachers[q].shape[1] - 1)
            )
            for (v, q), m in step.matches.items()
            if 0 <= q < len(step.teachers)
        }
        return step._replace(matches={**step.matches, **inside})
