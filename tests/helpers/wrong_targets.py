"""Targets that are wrong in one way each, by the property that is there to see it."""

import copy
import math
from contextlib import nullcontext

import torch
from torch import nn

from local_distill import Centering, TeacherTargets

WRONG = {}


def caught_by(name):
    """Register targets as those that only this property sees."""

    def register(kind):
        assert name not in WRONG
        WRONG[name] = kind
        return kind

    return register


class Changed(Centering):
    """Centering whose probabilities go through ``change``."""

    def forward(self, teacher_logits, *, teacher_temp, valid=None):
        made = super().forward(teacher_logits, teacher_temp=teacher_temp, valid=valid)
        return [ChangedTargets(each, self) for each in made]


class ChangedTargets(TeacherTargets):
    def __new__(cls, made, targets):
        one = super().__new__(cls, *made)
        one.targets = targets
        return one

    def probs(self):
        return self.targets.change(super().probs(), self)


# distributions


@caught_by("returns_targets_of_fitting_shapes")
class TupleForAList(Centering):
    def forward(self, teacher_logits, *, teacher_temp, valid=None):
        return tuple(super().forward(teacher_logits, teacher_temp=teacher_temp, valid=valid))


@caught_by("probs_are_distributions")
class SumsToTwo(Changed):
    def change(self, probs, made):
        c = probs.shape[-1]
        return probs * (1.0 + 1e-3 * (c > 1))


@caught_by("lower_temperatures_sharpen")
class OneTemperature(Centering):
    def forward(self, teacher_logits, *, teacher_temp, valid=None):
        super().forward(teacher_logits, teacher_temp=teacher_temp, valid=valid)
        return super().forward(teacher_logits, teacher_temp=0.1, valid=valid)


@caught_by("forward_changes_no_state")
class CountsItsCalls(Centering):
    def __init__(self, c):
        super().__init__(c)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, teacher_logits, *, teacher_temp, valid=None):
        made = super().forward(teacher_logits, teacher_temp=teacher_temp, valid=valid)
        self.calls.add_(1)
        return made


@caught_by("teacher_logits_receive_no_gradient")
class NotDetached(Centering):
    def forward(self, teacher_logits, *, teacher_temp, valid=None):
        made = super().forward(teacher_logits, teacher_temp=teacher_temp, valid=valid)
        return [
            each._replace(logits=logits) for each, logits in zip(made, teacher_logits, strict=True)
        ]


@caught_by("the_same_state_gives_the_same")
class Noisy(Changed):
    def change(self, probs, made):
        if self.training and not made.logits.is_meta:
            noise = 5e-7 * torch.rand(probs.shape, dtype=probs.dtype, device=probs.device)
            return (probs + noise) / (1 + noise.sum(-1, keepdim=True))
        return probs


@caught_by("inputs_are_left_alone")
class ClearsRowsInPlace(Centering):
    def update(self, teacher_logits, valid=None):
        super().update(teacher_logits, valid)
        if valid is not None:
            for logits, keep in zip(teacher_logits, valid, strict=True):
                logits[~keep] = 0.0


@caught_by("layout_does_not_matter")
class WantsContiguousLogits(Centering):
    def update(self, teacher_logits, valid=None):
        super().update(teacher_logits, valid)
        for logits in teacher_logits:
            if logits.shape[-1] > 1 and logits.stride(-1) != 1:
                raise RuntimeError("prototypes have to lie side by side")


@caught_by("new_tensors_follow_the_inputs_device")
class NewTensorOnTheDefaultDevice(Changed):
    def change(self, probs, made):
        return probs + torch.zeros(())


@caught_by("inference_mode_works")
class WritesIntoTheLogits(Centering):
    def update(self, teacher_logits, valid=None):
        super().update(teacher_logits, valid)
        for logits in teacher_logits:
            if logits.is_contiguous() and not logits.requires_grad:
                logits.add_(0)


@caught_by("half_precision_logits_agree_with_float32")
class RoundsHalf(Changed):
    def change(self, probs, made):
        return probs.bfloat16().float() if made.logits.dtype == torch.bfloat16 else probs


@caught_by("float64_stays_float64")
class RoundsFloat64(Changed):
    def change(self, probs, made):
        return probs.float()


@caught_by("autocast_changes_nothing")
class MultipliesUnderAutocast(Changed):
    def change(self, probs, made):
        mixing = 0.7 * torch.eye(probs.shape[-1], dtype=probs.dtype, device=probs.device)
        mixing = mixing + 0.3 / probs.shape[-1]
        return (probs @ mixing).to(probs.dtype)


@caught_by("large_logits_stay_finite")
class ExponentialsOverflow(Changed):
    def change(self, probs, made):
        return probs + 0.0 * made.logits.float().exp().to(probs.dtype)


@caught_by("one_prototype_is_served")
class DividesByTheEntropyOfOne(Changed):
    def change(self, probs, made):
        most = math.log(probs.shape[-1])
        return probs * (most / most if most else math.nan)


# state


@caught_by("targets_made_before_an_update_stay")
class LooksAtTheCenterLater(Changed):
    def change(self, probs, made):
        return TeacherTargets(made.logits, -self.center / made.temp, made.temp).probs()


@caught_by("nan_never_enters_the_state")
class Unguarded(Centering):
    def update(self, teacher_logits, valid=None):
        super().update(teacher_logits, valid)
        for view, logits in enumerate(teacher_logits):
            keep = True if valid is None else valid[view][..., None]
            good = torch.where(keep | logits.isfinite(), logits, 0.0).isfinite().all()
            self.center.copy_(torch.where(good, self.center, torch.nan))


@caught_by("a_bad_update_is_skipped_whole")
class ReplacesBadNumbers(Centering):
    def update(self, teacher_logits, valid=None):
        before = self.skipped.clone()
        super().update(teacher_logits, valid)
        fade = torch.where(self.skipped > before, self.momentum, 1.0)
        self.center.mul_(fade)


@caught_by("skipped_updates_are_counted")
class DoesNotCount(Centering):
    def update(self, teacher_logits, valid=None):
        super().update(teacher_logits, valid)
        self.skipped.zero_()


@caught_by("rows_that_are_not_valid_do_not_matter")
class TakesFiniteRows(Centering):
    def update(self, teacher_logits, valid=None):
        if valid is not None:
            super()._check_logits(teacher_logits, valid)
            valid = [logits.isfinite().all(-1) for logits in teacher_logits]
        super().update(teacher_logits, valid)


@caught_by("rows_that_are_not_valid_may_be_nan")
class MultipliesWithValid(Centering):
    def update(self, teacher_logits, valid=None):
        if valid is not None:
            super()._check_logits(teacher_logits, valid)
            rows = [x * keep[..., None] for x, keep in zip(teacher_logits, valid, strict=True)]
            bad = torch.stack([x.isnan().any() for x in rows]).any()
            teacher_logits = [torch.where(bad, torch.nan, x) for x in teacher_logits]
        super().update(teacher_logits, valid)


@caught_by("order_of_rows_does_not_matter")
class LaterTokensWeighMore(Centering):
    def update(self, teacher_logits, valid=None):
        if not isinstance(teacher_logits, torch.Tensor):
            teacher_logits = [self.weighted(logits) for logits in teacher_logits]
        super().update(teacher_logits, valid)

    def weighted(self, logits):
        if logits.dim() != 3 or not logits.is_floating_point():
            return logits
        places = torch.arange(1, logits.shape[1] + 1, dtype=torch.float32, device=logits.device)
        return logits.float() * (0.05 * places[:, None])


@caught_by("order_of_views_does_not_matter")
class LaterViewsWeighMore(Centering):
    def update(self, teacher_logits, valid=None):
        if not isinstance(teacher_logits, torch.Tensor):
            teacher_logits = [
                logits.float() * (1 + 0.1 * view) if logits.is_floating_point() else logits
                for view, logits in enumerate(teacher_logits)
            ]
        super().update(teacher_logits, valid)


@caught_by("accumulated_updates_are_one")
class MeanOfMeans(Centering):
    def update(self, teacher_logits, valid=None):
        super().update(teacher_logits, valid)
        if self._accumulating:
            self._sum.div_(self._count.clamp_min(1))
            self._count.clamp_max_(1)


@caught_by("nothing_moves_within_accumulation")
class ShowsTheSumAtOnce(Centering):
    def forward(self, teacher_logits, *, teacher_temp, valid=None):
        made = super().forward(teacher_logits, teacher_temp=teacher_temp, valid=valid)
        shown = self._sum / self._count.clamp_min(1) / teacher_temp
        return [each._replace(offset=each.offset - shown) for each in made]


@caught_by("accumulation_may_be_switched_off")
class AlwaysAccumulates(Centering):
    def accumulate(self, enabled=True):
        return super().accumulate(True)


class CenterNotSaved(Centering):
    def __init__(self, c):
        super().__init__(c)
        del self.center
        self.register_buffer("center", torch.zeros(c), persistent=False)


@caught_by("a_checkpoint_goes_on_alike")
class ForgetsTheCenter(CenterNotSaved):
    pass


@caught_by("a_checkpoint_within_accumulation_goes_on_alike")
class ForgetsTheSum(Centering):
    def __init__(self, c):
        super().__init__(c)
        total, count = self._sum, self._count
        del self._sum, self._count
        self.register_buffer("_sum", total, persistent=False)
        self.register_buffer("_count", count, persistent=False)


@caught_by("a_copy_learns_for_itself")
class CopiesShareTheCenter(Centering):
    def __deepcopy__(self, memo):
        other = type(self)(self.num_prototypes)
        other.load_state_dict(copy.deepcopy(self.state_dict()))
        other.center = self.center
        return other


@caught_by("casting_does_not_round_the_state")
class CenterIsCast(Centering):
    _apply = nn.Module._apply


@caught_by("half_precision_sums_do_not_overflow")
class SumsInHalf(Centering):
    def update(self, teacher_logits, valid=None):
        if not isinstance(teacher_logits, torch.Tensor) and all(
            logits.dtype == torch.float16 for logits in teacher_logits
        ):
            sums = [logits.flatten(0, -2).sum(0) for logits in teacher_logits]
            teacher_logits = [
                torch.where(total.isfinite(), logits, torch.inf)
                for total, logits in zip(sums, teacher_logits, strict=True)
            ]
        super().update(teacher_logits, valid)


@caught_by("an_empty_batch_leaves_the_state_alone")
class FadesWithoutImages(Centering):
    def update(self, teacher_logits, valid=None):
        super().update(teacher_logits, valid)
        if not any(logits.numel() for logits in teacher_logits):
            self.center.mul_(self.momentum)


@caught_by("updates_compile_without_graph_breaks")
class LooksAtTheCenter(Centering):
    def update(self, teacher_logits, valid=None):
        super().update(teacher_logits, valid)
        if float(self.center.abs().max()) > 1e30:
            self.center.zero_()


# bad input


@caught_by("bare_tensors_are_refused")
class CutsTensorsIntoViews(Centering):
    def forward(self, teacher_logits, *, teacher_temp, valid=None):
        return super().forward(list(teacher_logits), teacher_temp=teacher_temp, valid=valid)


@caught_by("integer_logits_are_refused")
class CastsIntegers(Centering):
    def update(self, teacher_logits, valid=None):
        if not isinstance(teacher_logits, torch.Tensor):
            teacher_logits = [x if x.is_floating_point() else x.float() for x in teacher_logits]
        super().update(teacher_logits, valid)


@caught_by("prototypes_that_differ_are_refused")
class BroadcastsPrototypes(Centering):
    def update(self, teacher_logits, valid=None):
        if not isinstance(teacher_logits, torch.Tensor):
            teacher_logits = [
                x.expand(*x.shape[:-1], self.num_prototypes) if x.shape[-1] == 1 else x
                for x in teacher_logits
            ]
        super().update(teacher_logits, valid)


@caught_by("temperatures_must_be_above_zero")
class ClampsTemperatures(Centering):
    def forward(self, teacher_logits, *, teacher_temp, valid=None):
        temp = max(teacher_temp, 1e-3)
        return super().forward(teacher_logits, teacher_temp=temp, valid=valid)


@caught_by("valid_that_does_not_fit_is_refused")
class BroadcastsValid(Centering):
    def update(self, teacher_logits, valid=None):
        if valid is not None and len(valid) == len(teacher_logits):
            valid = [
                keep.expand(logits.shape[:-1])
                for keep, logits in zip(valid, teacher_logits, strict=True)
            ]
        super().update(teacher_logits, valid)


class Stateless(nn.Module):
    """Right targets without any state: softmax alone."""

    def __init__(self, num_prototypes):
        super().__init__()
        self.checks = Centering(num_prototypes)
        for name in dict(self.checks.named_buffers()):
            self.checks._non_persistent_buffers_set.add(name)

    def forward(self, teacher_logits, *, teacher_temp, valid=None):
        return self.checks(teacher_logits, teacher_temp=teacher_temp, valid=valid)

    def update(self, teacher_logits, valid=None):
        self.checks._check_logits(teacher_logits, valid)

    def accumulate(self, enabled=True):
        return nullcontext()
