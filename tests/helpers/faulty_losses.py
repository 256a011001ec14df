"""For each row of the table of faults a loss, and targets, that fail there."""

import math

import torch

from helpers import step_oracles
from helpers.wrong_targets import WRONG, Changed
from local_distill import Centering, LocalDistillationLoss
from local_distill.testing import LossSubject

LOSSES, TARGETS = {}, {}


def right(loss, step):
    return loss(step.student, step.teacher, step.matches, teacher_temp=step.temp)


def subject(call=right, targets=Centering, **more):
    return LossSubject(lambda c: LocalDistillationLoss(targets(c)), call, tokens=True, **more)


def fails(*faults):
    """Register a way of calling a right loss that these rows have to see."""

    def register(call):
        for fault in faults:
            assert fault not in LOSSES
            LOSSES[fault] = subject(call)
        return call

    return register


def adds(*faults):
    """Register something that is added to a right loss, times 0."""

    def register(extra):
        return fails(*faults)(lambda loss, step: right(loss, step) + 0 * extra(step))

    return register


def changes(*faults):
    """Register a step that the loss makes of what it is given."""

    def register(change):
        return fails(*faults)(lambda loss, step: right(loss, change(step)))

    return register


def lengths(view):
    return view.norm(dim=-1, keepdim=True)


# numbers


def rounds(name, dtype):
    @fails(name)
    def call(loss, step):
        return right(loss, step) * (1.001 if step.student[0].dtype == dtype else 1.0)


for _dtype in (torch.float16, torch.bfloat16, torch.float32):
    rounds(str(_dtype).removeprefix("torch."), _dtype)


@changes("float64 is kept")
def in_float32(step):
    return step._replace(student=[view.float().to(view.dtype) for view in step.student])


@adds("values × 10", "values × 100", "values × 2,000", "float16 values up to ±60,000")
def exponentials(step):
    return (step.student[0].float() / 0.1).exp().sum()


@changes("autocast")
def multiplies(step):
    one = torch.eye(step.student[0].shape[-1], dtype=step.student[0].dtype)
    return step._replace(student=[(view @ one).to(view.dtype) for view in step.student])


@adds("float16 sums over 12,544 tokens of mean 8")
def sum_in_half(step):
    return step.student[0].sum()


@adds("values of 6 and more at temperature 0.04")
def sharp_exponentials(step):
    return (step.teacher[0].float() / step.temp).exp().sum()


@changes("temperature 0 and below")
def clamps_the_temperature(step):
    return step._replace(temp=max(step.temp, 1e-3))


@fails("c = 1")
def of_the_largest_entropy(loss, step):
    most = math.log(step.student[0].shape[-1])
    return right(loss, step) / most * most


@adds("teacher in another precision")
def product_of_both(step):
    return (step.student[0] @ step.teacher[0].mT).sum()


@changes("NaN in the student")
def hides_nan(step):
    return step._replace(student=[view.nan_to_num(nan=0.0) for view in step.student])


@changes("infinity in the student")
def hides_infinity(step):
    return step._replace(student=[view.clamp(max=30.0) for view in step.student])


LOSSES["NaN in the teacher"] = subject(targets=WRONG["nan_never_enters_the_state"])
LOSSES["infinity in the teacher"] = subject(targets=WRONG["a_bad_update_is_skipped_whole"])


@adds("NaN in a student token without a match")
def all_of_the_student(step):
    return step.student[0].sum()


@adds("NaN in a teacher token that answers none")
def all_of_the_teacher(step):
    return step.teacher[0].sum()


# tokens


@adds("student row of zero norm")
def directions(step):
    return (step.student[0] / lengths(step.student[0])).sum()


@adds("teacher row of zero norm")
def teacher_directions(step):
    return (step.teacher[0] / lengths(step.teacher[0])).sum()


@adds("duplicates")
def deviations(step):
    return step.student[0].var((0, 1)).sqrt().sum()


@adds("rows of length 1e-18 and 1e18")
def squares(step):
    return step.student[0].square().square().sum()


@fails("nothing is matched")
def shares(loss, step):
    mass = sum(found.weight.sum() for found in step.matches.values())
    return right(loss, step) / mass * mass


@fails("1 × 1 grids")
def of_the_distance_of_tokens(loss, step):
    apart = 1 / (step.student[0].shape[1] - 1)
    return right(loss, step) / apart * apart


@changes("4 × 7 beside 2 × 3")
def sixteen_tokens(step):
    matches = {
        pair: found._replace(
            weight=torch.where(torch.arange(found.weight.shape[1])[:, None] < 16, found.weight, 0)
        )
        for pair, found in step.matches.items()
    }
    return step._replace(matches=matches)


# In float64 it is cut as well: an oracle has to tell.
LOSSES["4 × 7 beside 2 × 3"] = LOSSES["4 × 7 beside 2 × 3"]._replace(oracle=step_oracles.local)


# views


@adds("no local views")
def of_the_local_views(step):
    return torch.stack([view.sum() for view in step.student[len(step.teacher) :]]).sum()


@adds("one view")
def of_the_pairs(step):
    return torch.stack([found.weight.sum() for found in step.matches.values()]).mean()


@adds("two local sizes")
def stacked(step):
    return torch.stack(step.student[2:]).sum() if len(step.student) > 2 else 0


@adds("one teacher view")
def second_teacher_view(step):
    return step.teacher[1].detach().sum()


@adds("more teacher than student views")
def view_by_view(step):
    return sum(step.student[q].sum() for q in range(len(step.teacher)))


@adds("batch of 1")
def over_the_batch(step):
    away = step.student[0] - step.student[0].mean(0)
    return (away.square().sum(0) / torch.tensor(float(len(away) - 1))).sum()


@adds("batch of 0")
def mean_of_the_batch(step):
    return step.student[0].mean()


@changes("teacher batch 1 against 2")
def broadcast_batch(step):
    b = len(step.student[0])
    return step._replace(teacher=[view.expand(b, -1, -1) for view in step.teacher])


@changes("student c = 1 against c = 16")
def broadcast_prototypes(step):
    c = step.teacher[0].shape[-1]
    return step._replace(student=[view.expand(-1, -1, c) for view in step.student])


# layout


@adds("non-contiguous", "expanded", "feature maps, channels first and last")
def as_it_lies(step):
    return step.student[0].view(-1).sum()


@fails("teacher that requires a gradient")
def learns_from_the_teacher(loss, step):
    return right(loss, step) + sum((view - view.detach()).sum() for view in step.teacher)


@fails("inference_mode tensors")
def writes_into_the_teacher(loss, step):
    with torch.no_grad():
        step.teacher[0].add_(0.0)
    return right(loss, step)


# state


@fails("eval() leaves it alone", "no_grad leaves it alone")
def always_learns(loss, step):
    value = right(loss, step)
    if not (loss.training and torch.is_grad_enabled()):
        loss.targets.update(step.teacher)
    return value


class Counting(LocalDistillationLoss):
    """Changes a number in place that the graph of the last call has kept."""

    def __init__(self, targets):
        super().__init__(targets)
        self.register_buffer("calls", torch.zeros(()))


def counts(loss, step):
    loss.calls.add_(1)
    return right(loss, step) + 0 * (step.student[0].sum() * loss.calls)


LOSSES["two forwards before one backward"] = subject(counts)._replace(
    make=lambda c: Counting(Centering(c))
)
LOSSES["deepcopy"] = subject(targets=WRONG["a_copy_learns_for_itself"])
LOSSES["state_dict in mid-training, and on"] = subject(targets=WRONG["a_checkpoint_goes_on_alike"])
LOSSES["half() and to(bfloat16)"] = subject(targets=WRONG["casting_does_not_round_the_state"])


# compile


@fails("aot_eager, ten steps", "inductor, ten steps")
def reads_a_number(loss, step):
    value = right(loss, step)
    return value if float(value.detach()) < 1e9 else value / 2


# Targets


def of_targets(*faults):
    """Register a change of right probabilities."""

    def register(change):
        for fault in faults:
            assert fault not in TARGETS
            TARGETS[fault] = type("Changing", (Changed,), {"change": staticmethod(change)})
        return change

    return register


def rounds_targets(name, dtype):
    @of_targets(name)
    def change(probs, made):
        return probs * (1.001 if made.logits.dtype == dtype else 1.0)


for _dtype in (torch.float16, torch.bfloat16, torch.float32):
    rounds_targets(str(_dtype).removeprefix("torch."), _dtype)


@of_targets("values × 10", "values × 100", "values × 2,000", "float16 values up to ±60,000")
def plain_softmax(probs, made):
    return probs + 0 * (made.logits.float() / made.temp).exp()


@of_targets("values of 6 and more at temperature 0.04")
def sharp_softmax(probs, made):
    return probs + 0 * (made.logits / made.temp).exp()


@of_targets("c = 1")
def entropy_of_one(probs, made):
    return probs / math.log(probs.shape[-1]) * math.log(probs.shape[-1])


@of_targets("NaN in the teacher", "infinity in the teacher")
def spreads(probs, made):
    return probs + 0 * probs.sum(0, keepdim=True)


@of_targets("all rows alike")
def standardised(probs, made):
    return probs + 0 / made.logits.float().std((0, 1))


@of_targets("whole views")
def over_what_should_be_tokens(probs, made):
    return probs if probs.dim() == 3 else probs.mean(0, keepdim=True).expand_as(probs)


@of_targets("non-contiguous", "expanded", "feature maps, channels first and last")
def as_logits_lie(probs, made):
    return probs + 0 * made.logits.view(-1)[0]


class ByOne(Centering):
    """Views one after the other, each with the mean of its own."""

    def update(self, teacher_logits, valid=None):
        for view in teacher_logits:
            super().update([view])


class TwoViews(Centering):
    def update(self, teacher_logits, valid=None):
        super().update([teacher_logits[0], teacher_logits[1]])


class DividesByImages(Centering):
    def update(self, teacher_logits, valid=None):
        scale = [1 / max(len(view) - 1, 0) if len(view) == 1 else 1 for view in teacher_logits]
        super().update([view * one for view, one in zip(teacher_logits, scale, strict=True)])


class CutsPrototypes(Centering):
    def forward(self, teacher_logits, *, teacher_temp, valid=None):
        wide = [view.expand(*view.shape[:-1], self.num_prototypes) for view in teacher_logits]
        return super().forward(wide, teacher_temp=teacher_temp)

    def update(self, teacher_logits, valid=None):
        wide = [view.expand(*view.shape[:-1], self.num_prototypes) for view in teacher_logits]
        super().update(wide)


class LearnsWhenCalled(Centering):
    def forward(self, teacher_logits, *, teacher_temp, valid=None):
        made = super().forward(teacher_logits, teacher_temp=teacher_temp)
        self.update(teacher_logits)
        return made


TARGETS.update({
    "float64 is kept": WRONG["float64_stays_float64"],
    "autocast": WRONG["autocast_changes_nothing"],
    "float16 sums over 12,544 tokens of mean 8": WRONG["half_precision_sums_do_not_overflow"],
    "temperature 0 and below": WRONG["temperatures_must_be_above_zero"],
    "minus infinity in the teacher": WRONG["nan_never_enters_the_state"],
    "one view": TwoViews,
    "three sizes": ByOne,
    "batch of 1": DividesByImages,
    "batch of 0": WRONG["an_empty_batch_leaves_the_state_alone"],
    "other prototypes than it was made for": CutsPrototypes,
    "a tensor in place of a list": WRONG["bare_tensors_are_refused"],
    "`valid` of 1 image against 3": WRONG["valid_that_does_not_fit_is_refused"],
    "teacher that requires a gradient": WRONG["teacher_logits_receive_no_gradient"],
    "inference_mode tensors": WRONG["inference_mode_works"],
    "a call leaves it alone": LearnsWhenCalled,
    "gradient accumulation": WRONG["accumulated_updates_are_one"],
    "deepcopy": WRONG["a_copy_learns_for_itself"],
    "state_dict in mid-training, and on": WRONG["a_checkpoint_within_accumulation_goes_on_alike"],
    "half() and to(bfloat16)": WRONG["casting_does_not_round_the_state"],
    "aot_eager, ten steps": WRONG["updates_compile_without_graph_breaks"],
    "inductor, ten steps": WRONG["updates_compile_without_graph_breaks"],
})  # fmt: skip
