"""What each loss gives on a `LossStep`: float64, differentiable, none of the package's maths.

Built on `feature_oracles`; a step may have any number of views.
"""

import math

import torch

from helpers import feature_oracles as plain
from helpers.feature_oracles import answers, mean, unit
from local_distill import Matches

STUDENT_TEMP = 0.1


def fixed(count, dim):
    """Rows that are always the same, such as the references of the patch order."""
    return ((torch.arange(count * dim) + dim) * 1.7).sin().reshape(count, dim)


def negatives(dim, count=7):
    """Rows for a queue, of length 1 to the bit in every dtype: along the axes, both ways."""
    rows = torch.zeros(count, dim)
    for i in range(count):
        rows[i, i % dim] = 1.0 if i // dim % 2 else -1.0
    return rows


def nothing(step):
    """0, on the student's graph, whatever stands in the student."""
    return step.student[0][:0].sum()


def average(values, step):
    return mean(values) if values else nothing(step)


def share(total, mass):
    """Of what nothing is matched in: 0."""
    return total / mass if mass else total


def view_pairs(students, teachers):
    return [(v, q) for v in range(students) for q in range(teachers) if v != q]


# Distillation


def moving_center(updates, views, temp):
    """Targets of `Centering`, whose center has seen these updates."""
    center = 0.0
    for step in updates:
        rows = torch.cat([view.reshape(-1, view.shape[-1]) for view in step])
        center = 0.9 * center + 0.1 * rows.mean(0)
    return centered([view - center for view in views], temp)


def centered(views, temp):
    """Targets of a new `Centering`, whose center is 0."""
    return [(view / temp).softmax(-1) for view in views]


def balanced(views, temp):
    """Targets of `SinkhornKnopp`, all views together; rows that are not finite have no share."""
    rows = torch.cat([view.reshape(-1, view.shape[-1]) for view in views])
    taken = rows.isfinite().all(-1)
    probs = torch.full_like(rows, torch.nan)
    probs[taken] = plain.sinkhorn_knopp(rows[taken], temp)
    parts = probs.split([view[..., 0].numel() for view in views])
    return [part.view_as(view) for part, view in zip(parts, views, strict=True)]


def cross_entropy(target, logits):
    return -(target * (logits / STUDENT_TEMP).log_softmax(-1)).sum()


def token_losses(student, probs, matches, image):
    """(mass, loss) of each matched token of one image."""
    for i, mass, index, weight in answers(matches, image):
        target = sum(w * probs[image, j] for j, w in zip(index, weight, strict=True))
        yield mass, cross_entropy(target, student[image, i])


def local(step, targets=centered, matches=None):
    probs = targets(step.teacher, step.temp)
    pairs = []
    for (v, q), found in (matches or step.matches).items():
        tokens = [
            token
            for image in range(len(step.student[v]))
            for token in token_losses(step.student[v], probs[q], found, image)
        ]
        total = sum((loss for _, loss in tokens), nothing(step))
        pairs.append(share(total, sum(mass for mass, _ in tokens)))
    return average(pairs, step)


def whole(step, targets=centered):
    probs = targets(step.teacher, step.temp)
    pairs = view_pairs(len(step.student), len(step.teacher))
    return mean([
        mean([cross_entropy(p, s) for p, s in zip(probs[q], step.student[v], strict=True)])
        for v, q in pairs
    ])  # fmt: skip


def first_tokens(step):
    """Whole views as the subjects that need both take them: each view's first token."""
    return step._replace(
        student=[view[:, 0] for view in step.student], teacher=[view[:, 0] for view in step.teacher]
    )


def masked(step):
    probs = centered(step.teacher, step.temp)
    views = []
    for student, target, valid in zip(step.student, probs, step.valid, strict=False):
        images = [
            average(
                [cross_entropy(target[b, i], student[b, i]) for i in keep.nonzero()[:, 0]], step
            )
            for b, keep in enumerate(valid)
        ]
        views.append(mean(images))
    return mean(views)


# Features


def dense(step, temp):
    keys = negatives(step.student[0].shape[-1]).double()
    return average([
        plain.dense_contrastive(step.student[v], step.teacher[q], found, keys, temp)
        if found.matched.any() else nothing(step)
        for (v, q), found in step.matches.items()
    ], step)  # fmt: skip


def contrast(step, temp):
    keys = negatives(step.student[0].shape[-1]).double()
    losses = []
    for v, q in view_pairs(len(step.student), len(step.teacher)):
        for x, y in zip(step.student[v], step.teacher[q], strict=True):
            scores = torch.cat(((unit(x) @ unit(y))[None], keys @ unit(x))) / temp
            losses.append(scores.logsumexp(0) - scores[0])
    return mean(losses)


def pixels(step):
    return average([
        plain.pixel_consistency(step.student[v], step.teacher[q], found)
        for (v, q), found in step.matches.items()
    ], step)  # fmt: skip


def propagated(step):
    def smooth(tokens):
        rows = [unit(token) for token in tokens]
        return torch.stack([sum((x @ y).clamp(min=0) ** 2 * y for y in rows) for x in rows])

    students = [torch.stack([smooth(image) for image in view]) for view in step.student]
    return pixels(step._replace(student=students))


def gram(step):
    return average([
        plain.gram(step.student[v], step.teacher[q], found)
        if found.matched.any() else nothing(step)
        for (v, q), found in step.matches.items()
    ], step)  # fmt: skip


def koleo(step):
    return mean([plain.koleo(view) for view in step.student])


def spread(rows):
    """25 times the variance term and once the covariance term; 0 for one row."""
    if len(rows) < 2:
        return 0 * rows.sum()
    variance, covariance = plain.variance_and_covariance(rows)
    return 25 * variance + covariance


def vicreg(step):
    views = step.student
    apart = [
        (views[v] - views[q]).square().mean() for v in range(len(views)) for q in range(v)
    ]  # fmt: skip
    return 25 * mean(apart) + mean([spread(view) for view in views])


def vicregl(step, alpha=0.75):
    pairs = []
    for (v, q), found in step.matches.items():
        squares, masses, positions = nothing(step), 0.0, {}
        for image in range(len(step.student[v])):
            for i, mass, index, weight in answers(found, image):
                x = step.student[v][image, i]
                parts = [w * step.student[q][image, j] for j, w in zip(index, weight, strict=True)]
                y = sum(parts) / mass
                squares, masses = squares + mass * (x - y).square().mean(), masses + mass
                positions.setdefault(i, []).append((x, y))
        kept = [rows for rows in positions.values() if len(rows) > 1]
        sides = [
            spread(torch.stack(side)) for rows in kept for side in zip(*rows, strict=True)
        ]  # fmt: skip
        pairs.append(25 * share(squares, masses) + (mean(sides) if sides else 0.0))
    return alpha * vicreg(first_tokens(step)) + (1 - alpha) * average(pairs, step)


def patch_order(step, steepness=100.0):
    """Four references; the network of four numbers compares 0-1, 2-3, then 0-2, 1-3, 0-1, 2-3."""
    anchors = [unit(row) for row in fixed(4, step.student[0].shape[-1]).double()]
    (v, q), found = first_pair(step)
    total, masses = nothing(step), 0.0
    for image in range(len(step.student[v])):
        for i, mass, index, weight in answers(found, image):
            parts = [w * step.teacher[q][image, j] for j, w in zip(index, weight, strict=True)]
            ours, theirs = (
                soft_permutation([unit(row) @ anchor for anchor in anchors], steepness)
                for row in (step.student[v][image, i], sum(parts))
            )
            total = total - mass * (theirs * ours.log()).sum()
            masses += 4 * mass
    return share(total, masses)


def first_pair(step):
    """Of one view with itself where there is no other."""
    same = Matches.identity(torch.ones(step.valid[0].shape, dtype=torch.bool))
    return next(iter(step.matches.items()), ((0, 0), same))


def soft_permutation(scores, steepness):
    x, table = list(scores), list(torch.eye(4, dtype=torch.float64))
    for low, high in ((0, 1), (3, 2), (0, 2), (1, 3), (0, 1), (2, 3)):
        keep = (steepness * (x[high] - x[low])).atan() / math.pi + 0.5
        for numbers in (x, table):
            a, b = numbers[low], numbers[high]
            numbers[low], numbers[high] = keep * a + (1 - keep) * b, keep * b + (1 - keep) * a
    return torch.stack(table, 1)


# SDSSL: a lower layer that is the last one's mirror image, at half its weight


def objective(student, targets, name, temp):
    ways = []
    for v, q in view_pairs(len(student), len(targets)):
        rows = [unit(row) for row in student[v]]
        answer = torch.stack([unit(row) for row in targets[q]])
        if name == "byol":
            ways.append(mean([2 - 2 * x @ y for x, y in zip(rows, answer, strict=True)]))
            continue
        others = torch.stack([unit(row) for row in targets[v]]) if name == "simclr" else None
        losses = []
        for i, x in enumerate(rows):
            scores = answer @ x / temp
            seen = scores
            if others is not None:
                seen = torch.cat((scores, torch.cat((others[:i], others[i + 1 :])) @ x / temp))
            losses.append(seen.logsumexp(0) - scores[i])
        ways.append(mean(losses))
    total = torch.stack(ways)
    return {"moco": 2 * temp * total.sum(), "byol": total.sum(), "simclr": total.mean()}[name]


def intermediate(step, name, temp=0.2, ratio=0.5):
    targets = step.student if name == "simclr" else step.teacher
    lower = [view.flip(-1) for view in step.student]
    stopped = [view.detach() for view in targets]
    return objective(step.student, targets, name, temp) + ratio * objective(
        lower, stopped, name, temp
    )
