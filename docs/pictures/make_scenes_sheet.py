"""Draws `scenes.png`, the contact sheet of `SyntheticScenes`; takes no arguments."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap

from local_distill.training.scenes import SyntheticScenes

COLUMNS, ROWS = 6, 3
SIDE = 64


def main() -> None:
    scenes = SyntheticScenes(4000, SIDE)
    # The first scenes of each class in turn, so that every class is on the sheet.
    of_class = {c: [i for i, t in enumerate(scenes.targets) if t == c] for c in range(10)}
    picks = [of_class[n % 10][n // 10] for n in range(COLUMNS * ROWS)]
    figure, axes = plt.subplots(ROWS + 1, COLUMNS, figsize=(9.6, 7.2), dpi=110)
    for axis in axes.flat:
        axis.axis("off")
    for axis, index in zip(axes.flat, picks, strict=False):
        scene = scenes.scene(index)
        axis.imshow(scene.image.permute(1, 2, 0), interpolation="nearest")
        axis.set_title(scenes.classes[scene.label], fontsize=9)

    background = (0.93, 0.93, 0.93)
    class_colours = ListedColormap([background, *plt.get_cmap("tab10").colors])
    object_colours = ListedColormap([background, *plt.get_cmap("Dark2").colors])
    # Two crowded scenes that are not above, chosen by eye.
    for first, index in ((0, 308), (3, 334)):
        scene = scenes.scene(index)
        image, classes, instances = axes[-1, first : first + 3]
        image.imshow(scene.image.permute(1, 2, 0), interpolation="nearest")
        image.set_title(scenes.classes[scene.label], fontsize=9)
        classes.imshow(scene.class_mask, cmap=class_colours, vmin=0, vmax=10)
        classes.set_title("class mask", fontsize=9)
        instances.imshow(scene.instance_mask, cmap=object_colours, vmin=0, vmax=8)
        instances.set_title("instance mask", fontsize=9)
    figure.tight_layout(pad=0.6)
    figure.savefig(Path(__file__).with_name("scenes.png"))


if __name__ == "__main__":
    main()
