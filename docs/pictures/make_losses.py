"""Draws docs/pictures/loss-*.png, what each loss compares: python docs/pictures/make_losses.py."""

import math
import sys
from pathlib import Path

import torch
from matplotlib.patches import Circle, FancyArrowPatch, Rectangle

from local_distill import (
    CrossImageQueue,
    JointClusters,
    KeepBest,
    NearestMatcher,
    RadiusMatcher,
    SimilarityMatcher,
    TokenGrid,
    Tokens,
    from_box,
    invert,
    token_centers,
)
from local_distill.masking import random_block_mask
from local_distill.neighbour_sampler import NeighbourSampler
from local_distill.viz import new_figure

SOURCE = (100, 140)  # height, width of the source that both views are cut from
GRID = TokenGrid.tiling(4, 4, view_size=(64, 64))
STUDENT_BOX, TEACHER_BOX = (10.0, 20.0, 80.0, 90.0), (34.0, 6.0, 114.0, 86.0)
GREEN, RED, GREY = "#1a7f37", "#c62828", "0.55"


class Picture:
    """A view of 4 × 4 tokens, coloured by where they lie in the source, drawn one unit a cell."""

    def __init__(self, ax, box, left, title="", top=0.0, size=1.0, mirrored=False):
        self.geometry = from_box(torch.tensor([box]), (64, 64), SOURCE)
        if mirrored:
            mirror = self.geometry.matrix.new_tensor([[-1, 0, 64], [0, 1, 0], [0, 0, 1]])
            self.geometry = self.geometry._replace(matrix=self.geometry.matrix @ mirror)
        self.ax, self.left, self.top, self.size = ax, left, top, size
        places = token_centers(self.geometry, GRID)[0].double()
        self.colors = torch.stack(
            (places[:, 0] / SOURCE[1], places[:, 1] / SOURCE[0], 1 - places[:, 0] / SOURCE[1]), 1
        )
        for token in range(16):
            self.cell(token, tuple((0.35 + 0.6 * self.colors[token].clamp(0, 1)).tolist()))
        ax.text(left + 2 * size, top - 0.25, title, ha="center", va="bottom", fontsize=9)

    def cell(self, token, color, **look):
        row, col = divmod(token, 4)
        self.ax.add_patch(
            Rectangle(
                (self.left + col * self.size, self.top + row * self.size),
                self.size,
                self.size,
                facecolor=color,
                **{"edgecolor": "white", "linewidth": 1, **look},
            )
        )

    def frame(self, token, color, width=2.0):
        self.cell(token, "none", edgecolor=color, linewidth=width, zorder=3)

    def center(self, token):
        row, col = divmod(token, 4)
        return self.left + (col + 0.5) * self.size, self.top + (row + 0.5) * self.size

    def tokens(self, features=None):
        return Tokens(features, self.geometry, GRID)


def arrow(ax, start, end, color="0.15", **look):
    look = {"arrowstyle": "-|>", "mutation_scale": 8, "linewidth": 0.9, "zorder": 4, **look}
    ax.add_patch(FancyArrowPatch(start, end, color=color, shrinkA=0, shrinkB=0, **look))


def clean(ax, width, height, title=""):
    ax.set_xlim(-0.3, width)
    ax.set_ylim(height, -0.9)
    ax.set_aspect("equal")
    ax.axis("off")
    if title:
        ax.set_title(title, fontsize=10)


def lines(student, teacher, matches):
    for token in range(16):
        if not bool(matches.matched[0, token]):
            x, y = student.center(token)
            student.ax.plot(x, y, "x", color="0.25", markersize=5)
            continue
        arrow(
            student.ax,
            student.center(token),
            teacher.center(int(matches.teacher_index[0, token, 0])),
            linewidth=0.7,
        )


def dino(path):
    figure = new_figure(5.2, 4.0)
    ax = figure.subplots()
    whole = (STUDENT_BOX, TEACHER_BOX)
    seen = [Picture(ax, box, 0, "", 3.0 * row, 0.6) for row, box in enumerate(whole)]
    answers = [Picture(ax, box, 7.2, "", 3.0 * row, 0.6) for row, box in enumerate(whole)]
    seen.append(Picture(ax, (52.0, 40.0, 84.0, 72.0), 0.6, "", 6.0, 0.3))
    for x, name in ((1.2, "student sees"), (8.4, "teacher sees")):
        ax.text(x, -0.25, name, ha="center", va="bottom", fontsize=9)
    for place, view in enumerate(seen):
        name, middle = "global" if place < 2 else "small", view.top + 2 * view.size
        ax.text(-0.35, middle, name, ha="right", va="center", fontsize=8)
        start = (view.left + 4 * view.size + 0.1, middle)
        for other, answer in enumerate(answers):
            if other != place:
                arrow(ax, start, (answer.left - 0.1, answer.top + 2 * answer.size), color=GREEN)
    clean(ax, 10.0, 7.6)
    ax.set_xlim(-1.6, 10.0)
    figure.savefig(path / "loss-dino.png", dpi=100)


def glsd(path):
    figure = new_figure(8, 2.9)
    noise = torch.Generator().manual_seed(3)
    for ax, (title, matcher) in zip(
        figure.subplots(1, 2),
        {
            "GLSD: the nearest place, or none": NearestMatcher(),
            "EsViT: the most similar features": SimilarityMatcher(),
        }.items(),
        strict=True,
    ):
        student = Picture(ax, STUDENT_BOX, 0, "student")
        teacher = Picture(ax, TEACHER_BOX, 6, "teacher", mirrored=True)
        features = [
            (one.colors - 0.5 + 0.12 * torch.randn(16, 3, generator=noise))[None].float()
            for one in (student, teacher)
        ]
        matches = matcher(student.tokens(features[0]), teacher.tokens(features[1]))
        lines(student, teacher, matches)
        clean(ax, 10.3, 4.2, title)
    figure.savefig(path / "loss-glsd.png", dpi=100)


def ibot(path):
    figure = new_figure(5, 2.6)
    ax = figure.subplots()
    student = Picture(ax, STUDENT_BOX, 0, "student sees")
    teacher = Picture(ax, STUDENT_BOX, 6, "teacher sees")
    masked = random_block_mask(
        1, 4, 4, ratio_ranges=[(0.4, 0.4)], generator=torch.Generator().manual_seed(1)
    )[0]
    for token in masked.nonzero().flatten().tolist():
        student.cell(token, "0.25")
        teacher.frame(token, "0.1")
        arrow(ax, student.center(token), teacher.center(token), color="0.45")
    clean(ax, 10.3, 4.2)
    figure.savefig(path / "loss-ibot.png", dpi=100)


def densecl(path):
    figure = new_figure(6, 2.6)
    ax = figure.subplots()
    student = Picture(ax, STUDENT_BOX, 0, "student")
    teacher = Picture(ax, TEACHER_BOX, 6, "teacher")
    features = [(one.colors - 0.5)[None].float() for one in (student, teacher)]
    found = SimilarityMatcher()(student.tokens(features[0]), teacher.tokens(features[1]))
    token = 6
    answer = int(found.teacher_index[0, token, 0])
    student.frame(token, "0.1")
    teacher.frame(answer, GREEN)
    arrow(ax, student.center(token), teacher.center(answer), color=GREEN, linewidth=1.6)
    shades = torch.rand(6, 3, generator=torch.Generator().manual_seed(4))
    ax.text(12.2, -0.25, "queue: one key an image", ha="center", va="bottom", fontsize=9)
    for row, shade in enumerate(shades):
        corner = (11.8, row * 0.68)
        ax.add_patch(Rectangle(corner, 0.8, 0.6, facecolor=tuple((0.4 + 0.5 * shade).tolist())))
        arrow(
            ax,
            student.center(token),
            (11.75, row * 0.68 + 0.3),
            color=RED,
            linewidth=0.6,
            linestyle="--",
            connectionstyle="arc3,rad=-0.12",
            alpha=0.7,
        )
    clean(ax, 14.3, 4.2)
    figure.savefig(path / "loss-densecl.png", dpi=100)


def pixpro(path):
    figure = new_figure(5.4, 2.9)
    ax = figure.subplots()
    student = Picture(ax, STUDENT_BOX, 0, "student, propagated")
    teacher = Picture(ax, TEACHER_BOX, 6, "teacher")
    found = RadiusMatcher(radius=0.7)(student.tokens(), teacher.tokens())
    token = 6
    for other in range(16):
        if other != token and torch.dist(student.colors[other], student.colors[token]) < 0.3:
            arrow(ax, student.center(other), student.center(token), color="white", linewidth=0.8)
    student.frame(token, "0.1")
    x, y = student.center(token)
    place = token_centers(student.geometry, GRID)[0, token].double()
    seen = invert(teacher.geometry).matrix[0].double() @ torch.cat((place, place.new_ones(1)))
    middle = (6 + float(seen[0]) / 16, float(seen[1]) / 16)
    ax.add_patch(
        Circle(middle, 0.7 * math.sqrt(2), fill=False, edgecolor="0.1", linestyle="--", zorder=3)
    )
    for other in range(16):
        if float(found.weight[0, token, other]) > 0:
            arrow(ax, (x, y), teacher.center(other), color=GREEN, linewidth=1.2)
    clean(ax, 10.5, 4.2)
    figure.savefig(path / "loss-pixpro.png", dpi=100)


def vicregl(path):
    figure = new_figure(6.4, 4.2)
    ax = figure.subplots()
    boxes = [
        ((4.0, 10.0, 74.0, 80.0), (34.0, 6.0, 114.0, 86.0)),
        ((40.0, 22.0, 110.0, 92.0), (24.0, 10.0, 94.0, 80.0)),
        ((20.0, 6.0, 90.0, 76.0), (40.0, 20.0, 120.0, 100.0)),
    ]
    chosen = []
    for image, (one, two) in enumerate(boxes):
        top = image * 3.1
        titles = ("one view", "the other") if image == 0 else ("", "")
        left = Picture(ax, one, 0, titles[0], top, 0.65)
        right = Picture(ax, two, 5, titles[1], top, 0.65)
        ax.text(-0.2, top + 1.3, f"image {image}", ha="right", va="center", fontsize=8)
        found = KeepBest(NearestMatcher(max_distance=None), count=4)(left.tokens(), right.tokens())
        kept = found.matched[0].nonzero().flatten().tolist()
        for rank, token in enumerate(kept):
            answer = int(found.teacher_index[0, token, 0])
            arrow(ax, left.center(token), right.center(answer), linewidth=0.7)
            row = (10.2 + rank * 0.9, top + 0.95)
            color = tuple((0.35 + 0.6 * left.colors[token].clamp(0, 1)).tolist())
            ax.add_patch(Rectangle(row, 0.65, 0.65, facecolor=color))
            left.frame(token, "0.1", 1)
            right.frame(answer, "0.1", 1)
        chosen.append(kept)
    ax.text(11.8, -0.25, "kept vectors", ha="center", va="bottom", fontsize=9)
    for rank in range(4):
        ax.add_patch(
            Rectangle((10.08 + rank * 0.9, 0.4), 0.89, 8.0, fill=False, edgecolor=RED, linewidth=1)
        )
        ax.text(10.52 + rank * 0.9, 8.9, str(rank), ha="center", fontsize=8, color=RED)
    ax.text(
        11.8,
        9.6,
        "variance and covariance,\nposition by position",
        ha="center",
        va="top",
        fontsize=8,
        color=RED,
    )
    clean(ax, 14.2, 10.8)
    ax.set_xlim(-2, 14.2)
    figure.savefig(path / "loss-vicregl.png", dpi=100)


def sdssl(path):
    figure = new_figure(5.6, 3.2)
    ax = figure.subplots()
    for name, left in (("student, one view", 0), ("teacher, the other view", 6)):
        ax.text(left + 1.2, -0.25, name, ha="center", va="bottom", fontsize=9)
        for layer in range(4):
            last = layer == 3
            shade = "#8ab4d8" if left == 0 else ("#e0b070" if last else "0.9")
            top = (3 - layer) * 1.15
            ax.add_patch(Rectangle((left, top), 2.4, 0.85, facecolor=shade, edgecolor="white"))
            label = "last layer" if last else f"layer {layer + 1}"
            ax.text(
                left + 1.2,
                top + 0.42,
                label,
                ha="center",
                va="center",
                fontsize=8,
                color="0.15" if left == 0 or last else "0.6",
            )
    for layer in range(4):
        top = (3 - layer) * 1.15 + 0.42
        last = layer == 3
        arrow(
            ax,
            (2.5, top),
            (5.9, 0.42),
            color=GREEN if last else "0.3",
            linewidth=1.8 if last else 0.9,
            linestyle="-" if last else "--",
        )
    ax.text(4.4, 3.9, "times the ratio, which\ngrows from 0", ha="center", fontsize=8, color="0.3")
    clean(ax, 9.2, 4.9)
    figure.savefig(path / "loss-sdssl.png", dpi=100)


def regularisers(path):
    figure = new_figure(8.4, 2.7)
    axes = figure.subplots(1, 3)

    ax = axes[0]
    angles = torch.tensor([0.3, 0.62, 1.9, 2.15, 3.6, 4.2, 5.4])
    points = torch.stack((angles.cos(), angles.sin()), 1)
    distance = torch.cdist(points, points).fill_diagonal_(9.0)
    ax.add_patch(Circle((0, 0), 1, fill=False, edgecolor="0.8"))
    for i, point in enumerate(points):
        nearest = points[int(distance[i].argmin())]
        away = (point - nearest) / (point - nearest).norm() * 0.35
        ax.plot(*point.tolist(), "o", color="#1565c0", markersize=5)
        arrow(ax, tuple(point.tolist()), tuple((point + away).tolist()), color=RED)
    ax.set_xlim(-1.75, 1.75)
    ax.set_ylim(-1.4, 1.4)
    ax.axis("off")
    ax.set_title("KoLeo: away from the nearest", fontsize=9)

    ax = axes[1]
    draw = torch.Generator().manual_seed(0)
    old = torch.randn(8, 3, generator=draw)
    new = old + 0.7 * torch.randn(8, 3, generator=draw)
    for left, features, name in ((0, new, "student"), (10, old, "earlier teacher")):
        unit = torch.nn.functional.normalize(features, dim=1)
        ax.imshow(
            (unit @ unit.mT).numpy(), extent=(left, left + 8, 8, 0), cmap="RdBu_r", vmin=-1, vmax=1
        )
        ax.text(left + 4, -0.4, name, ha="center", va="bottom", fontsize=8)
    ax.text(9, 4, "≈", ha="center", va="center", fontsize=14)
    ax.set_xlim(-0.2, 18.2)
    ax.set_ylim(11.36, -3.36)
    ax.axis("off")
    ax.set_title("Gram: patch × patch similarities", fontsize=9)

    ax = axes[2]
    order = [0, 1, 2, 3, 4]
    mixed = [0, 2, 1, 3, 4]
    for left, places, name in ((0, mixed, "student's order"), (4, order, "teacher's order")):
        ax.text(left + 0.5, -0.3, name, ha="center", va="bottom", fontsize=8)
        for row, reference in enumerate(places):
            shade = (0.2 + 0.15 * reference, 0.55, 0.9 - 0.15 * reference)
            ax.add_patch(Rectangle((left, row), 1, 0.85, facecolor=shade))
            ax.text(
                left + 0.5,
                row + 0.42,
                "ABCDE"[reference],
                ha="center",
                va="center",
                fontsize=8,
                color="white",
            )
    for row, reference in enumerate(mixed):
        same = row == reference
        arrow(ax, (1.1, row + 0.42), (3.9, reference + 0.42), color=GREY if same else RED)
    ax.set_xlim(-1.44, 6.44)
    ax.set_ylim(5.2, -1.1)
    ax.axis("off")
    ax.set_title("Patch order: references by similarity", fontsize=9)
    for ax in axes:
        # the limits have this shape too, so that units are as long in x as in y
        ax.set_aspect("auto")
        ax.set_box_aspect(0.8)
    figure.savefig(path / "loss-regularisers.png", dpi=100)


def tint(features):
    """The colour of features that a colour minus a half was made into, as `Picture` draws it."""
    return tuple((0.35 + 0.6 * (features + 0.5).clamp(0, 1)).tolist())


def square(ax, left, top, color, size=0.8, **look):
    look = {"edgecolor": "white", "linewidth": 1, **look}
    ax.add_patch(Rectangle((left, top), size, size, facecolor=color, **look))


def letters(view, label):
    """Each cell's cluster, and lines between cells of different ones."""
    for token in range(16):
        x, y = view.center(token)
        view.ax.text(x, y, "abcd"[label[token]], ha="center", va="center", fontsize=9)
        row, col = divmod(token, 4)
        if col < 3 and label[token] != label[token + 1]:
            view.ax.plot([x + 0.5] * 2, [y - 0.5, y + 0.5], color="0.1", linewidth=1.8)
        if row < 3 and label[token] != label[token + 4]:
            view.ax.plot([x - 0.5, x + 0.5], [y + 0.5] * 2, color="0.1", linewidth=1.8)


def croc(path):
    figure = new_figure(9, 2.9)
    left, right = figure.subplots(1, 2, width_ratios=(13.6, 9.4))
    views = Picture(left, STUDENT_BOX, 0, "one view"), Picture(left, TEACHER_BOX, 9.2, "the other")
    features = [(one.colors - 0.5)[None].float() for one in views]
    clusters = JointClusters(position_weight=1.0)(
        *(one.tokens(feature) for one, feature in zip(views, features, strict=True)),
        generator=torch.Generator().manual_seed(2),
    )
    objects = [part.pool(one)[0] for part, one in zip(clusters, features, strict=True)]
    shared = clusters[0].valid[0].nonzero().flatten().tolist()
    for view, part in zip(views, clusters, strict=True):
        letters(view, part.assignment[0].argmax(-1).tolist())
    for side, (column, name) in enumerate(((4.7, "student"), (7.7, "teacher"))):
        left.text(column + 0.4, -0.25, name, ha="center", va="bottom", fontsize=8)
        for cluster in shared:
            square(left, column, 0.1 + cluster, tint(objects[side][cluster]))
            left.text(column + 0.4, 0.5 + cluster, "abcd"[cluster], ha="center", va="center")
    for cluster in shared:
        arrow(left, (5.6, 0.5 + cluster), (7.6, 0.5 + cluster), color=GREEN, linewidth=1.4)
    clean(left, 13.5, 4.2, "CrOC: clusters that two views share")

    draw = torch.Generator().manual_seed(4)
    stored, again = (torch.rand(6, 1, 3, generator=draw) - 0.5 for _ in range(2))
    # Four rows that are like the objects; one of them was something else in the other view.
    for row, ours, theirs in ((0, 2, 2), (2, 0, 0), (3, 3, 3), (5, 1, 3)):
        noise = 0.06 * torch.randn(2, 3, generator=draw)
        stored[row, 0] = objects[0][ours] + noise[0]
        again[row, 0] = objects[1][theirs] + noise[1]
    one, two = (Tokens(view[shared][None]) for view in objects)
    queue = CrossImageQueue(num_images=6, num_objects=1, feature_dim=3)
    queue.update(Tokens(stored), Tokens(again))
    kept = queue(one, two).matched[0]
    queue.cycle = None  # where those go that are not kept
    row_of = queue(one, two).teacher_index[0, :, 0].tolist()
    unit = torch.nn.functional.normalize
    home = (unit(queue.rows(1), dim=-1) @ unit(two.features[0], dim=-1).mT).argmax(-1).tolist()
    for row in range(6):
        square(right, 3.5, row * 0.68, tint(stored[row, 0]), 0.6)
        square(right, 4.2, row * 0.68, tint(again[row, 0]), 0.6)
    for side, column in enumerate((0.0, 7.5)):
        for place, cluster in enumerate(shared):
            square(right, column, 0.1 + place, tint(objects[side][cluster]))
            right.text(column + 0.4, 0.5 + place, "abcd"[cluster], ha="center", va="center")
    for place, row in enumerate(row_of):
        look = {"color": GREEN} if bool(kept[place]) else {"color": RED, "linestyle": "--"}
        arrow(right, (0.9, 0.5 + place), (3.45, row * 0.68 + 0.3), **look)
        arrow(right, (4.85, row * 0.68 + 0.3), (7.45, 0.5 + home[row]), **look)
    for x, name in ((0.4, "one view"), (4.15, "queue, both views"), (7.9, "the other")):
        right.text(x, -0.25, name, ha="center", va="bottom", fontsize=8)
    clean(right, 8.8, 4.2, "CrIBo: objects of other images")
    right.set_xlim(-0.6, 8.8)
    figure.savefig(path / "loss-croc.png", dpi=100)


def adasim(path):
    figure = new_figure(8, 3)
    ax = figure.subplots()
    draw = torch.Generator().manual_seed(1)
    places = torch.rand(8, 3, generator=draw) - 0.5
    steady, moving, votes = 2, 5, 4
    sampler = NeighbourSampler(8, feature_dim=3, top_k=3, votes=votes, temp=0.15)
    spread = torch.full((8, 1), 0.04)
    spread[moving] = 0.6
    for _ in range(votes + 1):  # in the first there is nothing to vote for
        noise = torch.randn(8, 3, generator=draw)
        sampler.observe(torch.arange(8), places + spread * noise)
        sampler.end_epoch()
    ring = [(votes + 1 + epoch) % votes for epoch in range(votes)]  # the oldest first

    def image(number, of, left, top, size):
        own = {"edgecolor": "0.1", "linewidth": 1.6, "zorder": 3} if number == of else {}
        square(ax, left, top, tint(places[number]), size, **own)

    for index, (who, top) in enumerate(((steady, 0.0), (moving, 3.4))):
        image(who, who, 0.2, top + 0.55, 1.3)
        sums = torch.zeros(8)
        for column, epoch in enumerate(ring):
            for rank, (other, weight) in enumerate(
                zip(
                    sampler.vote_index[epoch, who].tolist(),
                    sampler.vote_similarity[epoch, who].tolist(),
                    strict=True,
                )
            ):
                image(other, who, 3 + column, top + rank * 0.85, 0.75)
                sums[other] += weight
        for rank, other in enumerate(sums.argsort(descending=True)[:3].tolist()):
            image(other, who, 8.2, top + rank * 0.85, 0.75)
            length = max(float(sums[other]), 0) / votes * 3
            ax.add_patch(Rectangle((9.1, top + 0.2 + rank * 0.85), length, 0.35, facecolor=GREY))
        found = sampler.distribution(torch.tensor([who]))
        shown = 3 if bool(found.adaptive[0]) else 1
        for rank in range(shown):
            line = top + (rank if shown == 3 else 1) * 0.85
            image(int(found.candidates[0, rank]), who, 14.2, line, 0.75)
            share = float(found.probs[0, rank])
            ax.text(15.2, line + 0.38, f"{share:.0%}", va="center", fontsize=9)
        arrow(ax, (12.6, top + 1.2), (13.8, top + 1.2))
        if index == 0:
            for x, name in (
                (0.85, "image"),
                (4.9, "votes of four epochs"),
                (10.2, "their mean"),
                (15.0, "second view of"),
            ):
                ax.text(x, -0.25, name, ha="center", va="bottom", fontsize=9)
    clean(ax, 17, 6.1)
    figure.savefig(path / "loss-adasim.png", dpi=100)


def main(path):
    for draw in (dino, glsd, ibot, densecl, pixpro, vicregl, sdssl, regularisers, croc, adasim):
        draw(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
