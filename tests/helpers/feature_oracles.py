"""What the losses on features and the targets are, in float64 and row by row.

Nothing here comes from the package; `Matches` are read by their fields. All is differentiable.
"""

import torch


def unit(row):
    return row / row.norm()


def answers(matches, image):
    """(student token, its mass, teacher tokens, their weights) of each token that is matched."""
    index, weight = matches.teacher_index[image], matches.weight[image].double()
    for i in range(index.shape[0]):
        mass = float(weight[i].sum())
        if mass > 0:
            yield i, mass, index[i], weight[i]


def mean(values):
    return torch.stack(values).mean()


def dense_contrastive(student, teacher, matches, keys, temp):
    negatives = torch.stack([unit(key) for key in keys])
    losses = []
    for image, tokens in enumerate(student):
        for i, _, index, weight in answers(matches, image):
            parts = [w * unit(teacher[image, j]) for j, w in zip(index, weight, strict=True)]
            x, answer = unit(tokens[i]), unit(sum(parts))
            scores = torch.cat(((x @ answer)[None], negatives @ x)) / temp
            losses.append(scores.logsumexp(0) - scores[0])
    return mean(losses)


def pixel_consistency(student, teacher, matches):
    images = []
    for image, tokens in enumerate(student):
        total, masses = tokens[:0].sum(), 0.0
        for i, mass, index, weight in answers(matches, image):
            for j, w in zip(index, weight, strict=True):
                total = total - w * (unit(tokens[i]) @ unit(teacher[image, j]))
            masses += mass
        images.append(total / masses if masses else total)
    return mean(images)


def variance_and_covariance(rows, eps=1e-4):
    """VICReg's two terms of (n, d), n above 1."""
    n, d = rows.shape
    away = rows - rows.mean(0)
    variance = covariance = 0.0
    for j in range(d):
        with_all = (away[:, j, None] * away).sum(0) / (n - 1)
        variance = variance + (1 - (with_all[j] + eps).sqrt()).clamp(min=0) / d
        covariance = covariance + (with_all.square().sum() - with_all[j].square()) / d
    return variance, covariance


def vicreg(one, two):
    value = 25 * mean([(x - y).square().mean() for x, y in zip(one, two, strict=True)])
    if one.shape[0] > 1:
        for rows in (one, two):
            variance, covariance = variance_and_covariance(rows)
            value = value + (25 * variance + covariance) / 2
    return value


def vicregl(whole, tokens, matches, alpha=0.75):
    """Of two views, and matches from the first one's tokens to the second one's."""
    pairs = {}
    squares, masses = 0.0, 0.0
    for image in range(tokens[0].shape[0]):
        for i, mass, index, weight in answers(matches, image):
            x = tokens[0][image, i]
            y = sum(w * tokens[1][image, j] for j, w in zip(index, weight, strict=True)) / mass
            squares, masses = squares + mass * (x - y).square().mean(), masses + mass
            pairs.setdefault(i, []).append((x, y))
    local = 25 * squares / masses
    positions = [rows for rows in pairs.values() if len(rows) > 1]
    for rows in positions:
        for side in zip(*rows, strict=True):
            variance, covariance = variance_and_covariance(torch.stack(side))
            local = local + (25 * variance + covariance) / 2 / len(positions)
    return alpha * vicreg(*whole) + (1 - alpha) * local


def koleo(features, eps=1e-8):
    rows = [unit(row) for row in features]
    if len(rows) < 2:
        return 0 * features.sum()
    logs = []
    for i, row in enumerate(rows):
        products = [
            float(row.detach() @ other.detach()) if j != i else -2.0 for j, other in enumerate(rows)
        ]
        difference = row - rows[products.index(max(products))]
        if not difference.any():
            difference = difference.detach()  # equal rows have no direction to be pushed in
        logs.append(-((difference + eps).norm() + eps).log())
    return mean(logs) + 0 * features.sum()  # with a graph where all are equal


def gram(student, teacher, matches):
    total, count = 0.0, 0
    for image, tokens in enumerate(student):
        rows = []
        for i, _, index, weight in answers(matches, image):
            parts = [w * teacher[image, j] for j, w in zip(index, weight, strict=True)]
            rows.append((unit(tokens[i]), unit(sum(parts))))
        for x, y in rows:
            for other, answer in rows:
                total = total + (x @ other - y @ answer).square()
        count += len(rows) ** 2
    return total / count


def byol(student, targets):
    """Of two views, both ways, as the next two."""
    ways = [
        mean([2 - 2 * unit(x) @ unit(y) for x, y in zip(student[v], targets[1 - v], strict=True)])
        for v in (0, 1)
    ]
    return sum(ways)


def info_nce(student, targets, temp, own):
    """Per way the mean over rows; with ``own`` the other images' targets of the same view too."""
    ways = []
    for v in (0, 1):
        keys = torch.stack([unit(row) for row in targets[1 - v]])
        others = torch.stack([unit(row) for row in targets[v]])
        losses = []
        for i, row in enumerate(student[v]):
            x = unit(row)
            scores = keys @ x / temp
            seen = [scores, (torch.cat((others[:i], others[i + 1 :])) @ x) / temp]
            losses.append(torch.cat(seen[: 2 if own else 1]).logsumexp(0) - scores[i])
        ways.append(mean(losses))
    return torch.stack(ways)


def moco_v3(student, targets, temp):
    return 2 * temp * info_nce(student, targets, temp, own=False).sum()


def simclr(student, targets, temp):
    return info_nce(student, targets, temp, own=True).mean()


def centering(rows, center, temp):
    return torch.stack([((row - center) / temp).softmax(0) for row in rows])


def sinkhorn_knopp(rows, temp, iterations=3):
    """Columns are brought to equal sums, then rows, on logarithms."""
    scores = rows / temp
    for _ in range(iterations):
        scores = torch.stack([column - column.logsumexp(0) for column in scores.mT], 1)
        scores = torch.stack([row - row.logsumexp(0) for row in scores])
    return scores.exp()
