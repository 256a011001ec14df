"""What the oracles of the joint clusterings share, in float64 loops; nothing of the package."""

import math

import torch

from helpers import oracles


def joint_tokens(student, teacher):
    """Per image: unit features (lists of floats, or None) and source points of all tokens."""
    images = []
    for image in range(student.features.shape[0]):
        units, points = [], []
        for tokens in (student, teacher):
            for i in range(tokens.features.shape[1]):
                row = [float(v) for v in tokens.features[image, i].double()]
                norm = math.sqrt(sum(v * v for v in row))
                good = math.isfinite(norm) and norm > 0
                point = (0.0, 0.0)
                if tokens.geometry is not None:
                    place = divmod(i, tokens.grid.cols)
                    point = oracles.center(tokens.geometry, tokens.grid, image, *place)
                    size = tokens.geometry.source_size[image].tolist()
                    good = good and oracles.is_inside(point, size)
                units.append([v / norm for v in row] if good else None)
                points.append(point)
        images.append((units, points))
    return images


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def unit(a):
    norm = math.sqrt(dot(a, a))
    return [x / norm for x in a] if norm > 0 else a


def weighted_mean(weights, rows):
    """Of lists of floats, or None where there is no weight."""
    total = sum(weights)
    if total == 0:
        return None
    width = len(next(row for row in rows if row is not None))
    return [
        sum(w * row[c] for w, row in zip(weights, rows, strict=True) if w > 0) / total
        for c in range(width)
    ]


def transport_plans(units, centroids, distances, row, col, weight, epsilon, iterations, scale):
    """Plans and costs of all images in step; a list entry each.

    units[image][n] is None for tokens that are not there, centroids[image][k] likewise.
    """
    tables = []
    for image, rows in enumerate(units):
        live = {
            (n, k): distances[image][n][k]
            for n, z in enumerate(rows)
            for k, c in enumerate(centroids[image])
            if z is not None and c is not None
        }
        largest = max(live.values(), default=0.0)
        tables.append(
            {
                (n, k): -dot(rows[n], centroids[image][k])
                + weight * (d / largest if largest > 0 else 0.0)
                for (n, k), d in live.items()
            }
        )
    plans, costs = [], []
    for image, table in enumerate(tables):
        seen = list(table.values()) if scale == "image" else [v for t in tables for v in t.values()]
        low, high = min(seen, default=0.0), max(seen, default=1.0)
        table = {key: (v - low) / ((high - low) or 1.0) for key, v in table.items()}
        plan = {key: math.exp(-v / epsilon) for key, v in table.items()}
        for _ in range(iterations):
            for axis, masses in ((0, row[image]), (1, col[image])):
                totals = {}
                for key, value in plan.items():
                    totals[key[axis]] = totals.get(key[axis], 0.0) + value
                plan = {k: v * masses[k[axis]] / totals[k[axis]] for k, v in plan.items()}
        costs.append(sum(v * table[key] for key, v in plan.items()))
        n, k = len(units[image]), len(centroids[image])
        plans.append([[plan.get((i, j), 0.0) for j in range(k)] for i in range(n)])
    return plans, costs


def hard_shares(plan, first, last, by_share):
    """[n][k] of the tokens first..last: each cluster's shares, each token in its largest alone."""
    part = plan[first:last]
    k = len(plan[0])
    sums = [sum(row[j] for row in part) for j in range(k)]
    shares = [[row[j] / sums[j] if sums[j] > 0 else 0.0 for j in range(k)] for row in part]
    judged = shares if by_share else part
    hard = [[0.0] * k for _ in part]
    for i, row in enumerate(judged):
        if max(row) > 0:
            best = row.index(max(row))
            hard[i][best] = shares[i][best] if by_share else 1.0
    sums = [sum(row[j] for row in hard) for j in range(k)]
    return [[row[j] / sums[j] if sums[j] > 0 else 0.0 for j in range(k)] for row in hard]


def check_clusters(found, wanted, tolerance):
    """Both sides' `Clusters` against [image] of (student, teacher) assignments."""
    for image, sides in enumerate(wanted):
        valid = [
            all(any(row[j] > 0 for row in side) for side in sides)
            for j in range(found[0].valid.shape[1])
        ]
        for clusters, side in zip(found, sides, strict=True):
            torch.testing.assert_close(
                clusters.assignment[image].double(),
                torch.tensor(side, dtype=torch.float64).reshape(clusters.assignment.shape[1:]),
                rtol=0,
                atol=tolerance,
            )
            assert clusters.valid[image].tolist() == valid
