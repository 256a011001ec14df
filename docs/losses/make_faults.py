"""Prints the table of docs/losses/faults.md: python docs/losses/make_faults.py [NAME ...]."""

import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from helpers import step_oracles as oracles

from local_distill import SimilarityMatcher, Tokens, ViewOutput, losses
from local_distill.structures import PrototypeLogits
from local_distill.targets import Centering, SinkhornKnopp
from local_distill.testing import LossSubject, fault_table, loss_faults, target_faults

TEMP = 0.2


def local(make_targets, oracle_targets):
    return LossSubject(
        make=lambda c: losses.LocalDistillationLoss(make_targets(c)),
        call=lambda loss, step: loss(
            step.student, step.teacher, step.matches, teacher_temp=step.temp
        ),
        tokens=True,
        oracle=partial(oracles.local, targets=oracle_targets),
        with_temp=lambda temp: losses.LocalDistillationLoss(make_targets(4), student_temp=temp),
    )


def whole(make_targets, oracle_targets):
    return LossSubject(
        make=lambda c: losses.GlobalDistillationLoss(make_targets(c)),
        call=lambda loss, step: loss(step.student, step.teacher, teacher_temp=step.temp),
        oracle=partial(oracles.whole, targets=oracle_targets),
        with_temp=lambda temp: losses.GlobalDistillationLoss(make_targets(4), student_temp=temp),
    )


def make_global_local(c):
    return losses.GlobalLocalDistillationLoss(
        losses.GlobalDistillationLoss(Centering(c)),
        losses.LocalDistillationLoss(Centering(c)),
        SimilarityMatcher(),
    )


def features(tokens, dtype=torch.float32):
    """What the matcher compares: fixed rows, and none for the last token."""
    rows = oracles.fixed(tokens, 3).to(dtype)
    if tokens > 1:
        rows[-1] = 0.0
    return rows


def call_global_local(loss, step):
    student, teacher = (
        [
            ViewOutput(view[:, 0], view, Tokens(features(view.shape[1]).expand(len(view), -1, -1)))
            for view in views
        ]
        for views in (step.student, step.teacher)
    )
    return loss(student, teacher, teacher_temp=step.temp).loss


def global_local_oracle(step):
    matches = {}
    for (v, q), found in step.matches.items():
        ours, theirs = (
            torch.nn.functional.normalize(features(view.shape[1], torch.float64), dim=-1)
            for view in (step.student[v], step.teacher[q])
        )
        usable = theirs.any(-1)  # a row of zeros answers none
        index = (
            (ours @ theirs.mT)
            .masked_fill(~usable, -2.0)
            .argmax(-1)[None, :, None]
            .expand(len(found.weight), -1, -1)
        )
        weight = ours.any(-1)[None, :, None].expand_as(index).double()
        matches[v, q] = found._replace(teacher_index=index, weight=weight)
    both = oracles.whole(oracles.first_tokens(step)) + oracles.local(step, matches=matches)
    return both / 2


def unmultiplied(subject, make):
    """A subject whose values are features, and its logits their products with 8 prototypes."""

    def weight(views):
        # 32nds, which every dtype holds.
        rows = (32 * oracles.fixed(8, views[0].shape[-1])).round() / 32
        return rows.to(views[0].dtype)

    def scores(views):
        prototypes = weight(views)
        return [PrototypeLogits(view, prototypes) for view in views]

    def products(views):
        prototypes = weight(views)
        return [view @ prototypes.mT for view in views]

    def mapped(step, change):
        return step._replace(student=change(step.student), teacher=change(step.teacher))

    return LossSubject(
        make=lambda c: make(Centering(8)),
        call=lambda loss, step: subject.call(loss, mapped(step, scores)),
        tokens=subject.tokens,
        oracle=lambda step: subject.oracle(mapped(step, products)),
        with_temp=subject.with_temp,
    )


def filled(loss, c):
    loss.queue.update(oracles.negatives(c))
    return loss


def queued(kind):
    return lambda c: filled(kind(losses.NegativeQueue(30, c), temp=TEMP), c)


def colder(kind):
    return lambda temp: kind(losses.NegativeQueue(30, 4), temp=temp)


def call_dense(loss, step):
    return loss(step.student, step.teacher, step.matches)


def call_propagation(loss, step):
    propagate = losses.PixelPropagation(step.student[0].shape[-1], num_layers=0)
    return loss([propagate(view) for view in step.student], step.teacher, step.matches)


def call_masked(loss, step):
    seen = [keep if v < len(step.teacher) else None for v, keep in enumerate(step.valid)]
    return loss(step.student, step.teacher, seen, teacher_temp=step.temp)


def call_patch_order(loss, step):
    (v, q), found = oracles.first_pair(step)
    wide = torch.promote_types(step.student[v].dtype, torch.float32)
    references = oracles.fixed(4, step.student[v].shape[-1]).to(wide)
    return loss(step.student[v], step.teacher[q], references, found)


def sdssl(objective, name, **more):
    def call(loss, step):
        layers = [torch.stack((view.flip(-1), view)) for view in step.student]
        targets = step.student if name == "simclr" else step.teacher
        return loss(layers, targets, ratio=0.5).loss

    return LossSubject(
        make=lambda c: losses.IntermediateDistillationLoss(objective(), depth=2),
        call=call,
        oracle=partial(oracles.intermediate, name=name),
        **more,
    )


LOCAL, WHOLE = local(Centering, oracles.centered), whole(Centering, oracles.centered)
SUBJECTS = {
    "Local": LOCAL,
    "Local, `PrototypeLogits`": unmultiplied(LOCAL, losses.LocalDistillationLoss),
    "Local, Sinkhorn": local(SinkhornKnopp, oracles.balanced),
    "Global": WHOLE,
    "Global, `PrototypeLogits`": unmultiplied(WHOLE, losses.GlobalDistillationLoss),
    "Global, Sinkhorn": whole(SinkhornKnopp, oracles.balanced),
    "Global and local": LossSubject(
        make_global_local, call_global_local, tokens=True, oracle=global_local_oracle
    ),
    "Masked": LossSubject(
        make=lambda c: losses.MaskedDistillationLoss(Centering(c)),
        call=call_masked,
        tokens=True,
        oracle=oracles.masked,
        with_temp=lambda temp: losses.MaskedDistillationLoss(Centering(4), student_temp=temp),
    ),
    "Dense contrast": LossSubject(
        make=queued(losses.DenseContrastiveLoss),
        call=call_dense,
        tokens=True,
        oracle=partial(oracles.dense, temp=TEMP),
        with_temp=colder(losses.DenseContrastiveLoss),
    ),
    "Global contrast": LossSubject(
        make=queued(losses.GlobalContrastiveLoss),
        call=lambda loss, step: loss(step.student, step.teacher),
        oracle=partial(oracles.contrast, temp=TEMP),
        with_temp=colder(losses.GlobalContrastiveLoss),
    ),
    "Pixel consistency": LossSubject(
        make=lambda c: losses.PixelConsistencyLoss(),
        call=call_dense,
        tokens=True,
        oracle=oracles.pixels,
    ),
    "Pixel propagation": LossSubject(
        make=lambda c: losses.PixelConsistencyLoss(),
        call=call_propagation,
        tokens=True,
        oracle=oracles.propagated,
    ),
    "SDSSL, MoCo v3": sdssl(losses.MocoV3Objective, "moco", with_temp=losses.MocoV3Objective),
    "SDSSL, BYOL": sdssl(losses.ByolObjective, "byol"),
    "SDSSL, SimCLR": sdssl(losses.SimclrObjective, "simclr", with_temp=losses.SimclrObjective),
    "VICReg": LossSubject(
        make=lambda c: losses.VICRegLoss(),
        call=lambda loss, step: loss(step.student),
        oracle=oracles.vicreg,
    ),
    "VICRegL": LossSubject(
        make=lambda c: losses.VICRegLLoss(),
        call=lambda loss, step: (
            loss([v[:, 0] for v in step.student], step.student, feature_matches=step.matches).loss
        ),
        tokens=True,
        oracle=oracles.vicregl,
    ),
    "KoLeo": LossSubject(
        make=lambda c: losses.KoLeoLoss(),
        call=lambda loss, step: loss(step.student),
        oracle=oracles.koleo,
    ),
    "Gram": LossSubject(
        make=lambda c: losses.GramAnchoringLoss(),
        call=call_dense,
        tokens=True,
        oracle=oracles.gram,
    ),
    "Patch order": LossSubject(
        make=lambda c: losses.PatchOrderLoss(),
        call=call_patch_order,
        tokens=True,
        oracle=oracles.patch_order,
        with_temp=lambda temp: losses.PatchOrderLoss(student_steepness=temp),
    ),
}
MANY = "float16 sums over 12,544 tokens of mean 8"
TABLE = {MANY: "compares each of 12,544 whole views with all others"}
FOURTH_POWER = {"rows of length 1e-18 and 1e18": "it grows with the fourth power of the values"}
PRODUCTS = {"student c = 1 against c = 16": "the prototypes bring either to the same logits"}
NOT_APPLICABLE = {
    "Local, `PrototypeLogits`": PRODUCTS,
    "Global, `PrototypeLogits`": PRODUCTS,
    "Pixel propagation": {
        "NaN in a student token without a match": "each token is propagated to all others"
    },
    "SDSSL, MoCo v3": TABLE,
    "SDSSL, SimCLR": TABLE,
    "VICReg": FOURTH_POWER,
    "VICRegL": FOURTH_POWER,
    "KoLeo": {
        **TABLE,
        "teacher batch 1 against 2": "views are never mixed",
        "student c = 1 against c = 16": "views are never mixed",
    },
    "Gram": {"student c = 1 against c = 16": "the teacher may have another number of channels"},
}


TARGETS = {
    "Centering": (Centering, oracles.moving_center),
    "SinkhornKnopp": (SinkhornKnopp, lambda _, views, temp: oracles.balanced(views, temp)),
}


def results_of(name, groups=None):
    if name in TARGETS:
        targets, oracle = TARGETS[name]
        return target_faults(targets, oracle=oracle, groups=groups)
    return loss_faults(SUBJECTS[name], groups=groups, not_applicable=NOT_APPLICABLE.get(name))


def main(names):
    for part in (SUBJECTS, TARGETS):
        results = {name: results_of(name) for name in part if not names or name in names}
        for name, column in results.items():
            for result in column:
                if result.outcome == "WRONG":
                    print(f"{name}: {result}", file=sys.stderr)
        if results:
            print(fault_table(results), end="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
