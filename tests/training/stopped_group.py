"""Trains with two workers until one of them sends SIGTERM to all processes of the run: FOLDER.

Twice: as it is, and with workers that end of it at once, as where nobody can tell who sent a
signal. Prints what came of each.
"""

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

from helpers.training_cases import small_views, train_small

from local_distill.training import loading


class Stopping:
    """Views; at the given image a worker ends the run, as a terminal or a scheduler would."""

    def __init__(self, image):
        self.views, self.num_global, self.image, self.seen = small_views(), 2, image, 0

    def __call__(self, image):
        self.seen += 1
        if self.seen == self.image and multiprocessing.parent_process() is not None:
            os.killpg(os.getpgrp(), signal.SIGTERM)
        return self.views(image)


def stopped(folder):
    try:
        result = train_small(folder, views=Stopping(12), workers=2, steps=500, log_every=500)
        told = {"step": result.step, "interrupted": result.interrupted}
        told["checkpoint"] = result.checkpoint.name
    except BaseException as error:
        told = {"raised": type(error).__name__, "message": str(error)}
    return told | {"workers": len(multiprocessing.active_children())}


def main(folder):
    told = [stopped(Path(folder) / "patient")]
    loading.leave_stopping_to_the_parent = lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL)
    told.append(stopped(Path(folder) / "hasty"))
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
