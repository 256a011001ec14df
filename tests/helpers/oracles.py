"""The truth, in float64 and naive loops; nothing here is shared with the package."""

import math


def center(geometry, grid, image, row, col):
    """Source point of a token's centre, by hand."""
    x = grid.offset[0] + grid.stride[0] * col
    y = grid.offset[1] + grid.stride[1] * row
    m = geometry.matrix[image].double().tolist()
    u = m[0][0] * x + m[0][1] * y + m[0][2]
    v = m[1][0] * x + m[1][1] * y + m[1][2]
    w = m[2][0] * x + m[2][1] * y + m[2][2]
    return (u / w, v / w) if w > 0 else (math.nan, math.nan)


def diagonal(geometry, grid, image, row, col):
    """Cell diagonal by central differences of half a per mille of a cell."""
    step = 5e-4
    total = 0.0
    for d_row, d_col in ((0, step), (step, 0)):
        a = center(geometry, grid, image, row + d_row, col + d_col)
        b = center(geometry, grid, image, row - d_row, col - d_col)
        total += ((a[0] - b[0]) / (2 * step)) ** 2 + ((a[1] - b[1]) / (2 * step)) ** 2
    return math.sqrt(total)


def is_inside(point, source_size):
    """In the closed source rectangle; False for NaN."""
    return 0 <= point[0] <= source_size[1] and 0 <= point[1] <= source_size[0]


def nearest(student, teacher):
    """[b][s] of (pixel distance, distance in cells) to the nearest valid teacher token, or None."""
    result = []
    for image in range(student.geometry.matrix.shape[0]):
        size = teacher.geometry.source_size[image].tolist()
        targets = []
        for r in range(teacher.grid.rows):
            for c in range(teacher.grid.cols):
                point = center(teacher.geometry, teacher.grid, image, r, c)
                if is_inside(point, size):
                    targets.append((point, diagonal(teacher.geometry, teacher.grid, image, r, c)))
        row_result = []
        for r in range(student.grid.rows):
            for c in range(student.grid.cols):
                point = center(student.geometry, student.grid, image, r, c)
                if not is_inside(point, size) or not targets:
                    row_result.append(None)
                    continue
                own = diagonal(student.geometry, student.grid, image, r, c)
                pixels, other = min(
                    (math.hypot(point[0] - q[0], point[1] - q[1]), d) for q, d in targets
                )
                row_result.append((pixels, pixels / max(own, other)))
        result.append(row_result)
    return result


def softmax(row):
    """Of a list of floats."""
    top = max(row)
    parts = [math.exp(value - top) for value in row]
    return [part / sum(parts) for part in parts]


def log_softmax(row):
    """Of a list of floats."""
    top = max(row)
    norm = top + math.log(sum(math.exp(value - top) for value in row))
    return [value - norm for value in row]


def token_cross_entropies(student, teacher, index, weight, center_, student_temp, teacher_temp):
    """[b][s] of Σ_k w·CE(teacher softmax, student log-softmax), and [b][s] of the mass."""
    losses, masses = [], []
    for image in range(student.shape[0]):
        row_losses, row_masses = [], []
        for i in range(student.shape[1]):
            logs = log_softmax([float(v) / student_temp for v in student[image, i]])
            total = mass = 0.0
            for j, w in zip(index[image, i].tolist(), weight[image, i].tolist(), strict=True):
                if w == 0:
                    continue
                values = [
                    (float(v) - float(c)) / teacher_temp
                    for v, c in zip(teacher[image, j], center_, strict=True)
                ]
                probs = softmax(values)
                total -= w * sum(p * q for p, q in zip(probs, logs, strict=True))
                mass += w
            row_losses.append(total)
            row_masses.append(mass)
        losses.append(row_losses)
        masses.append(row_masses)
    return losses, masses


def normalized(losses, masses, normalize):
    """One pair's loss."""
    b = len(losses)
    s = len(losses[0]) if b else 0
    if normalize == "all":
        return sum(map(sum, losses)) / (b * s)
    if normalize == "matched":
        mass = sum(map(sum, masses))
        return sum(map(sum, losses)) / mass if mass > 0 else 0.0
    total = 0.0
    for row, row_masses in zip(losses, masses, strict=True):
        total += sum(row) / sum(row_masses) if sum(row_masses) > 0 else 0.0
    return total / b
