"""Kills workers of a loader while it runs, and prints what was raised: FOLDER HOW.

HOW: "killed", "both killed", or "cut off": the main process sees the worker's socket closed before
it learns of the death by a signal.
"""

import json
import multiprocessing.resource_sharer as sharer
import os
import signal
import sys
import time

import torch
from torch.utils.data import DataLoader

from local_distill.training.data import ImageFiles, named_worker_failures


def size(image):
    return torch.tensor(image.size)


def main(folder, how):
    loader = DataLoader(
        ImageFiles(folder, transform=size),
        batch_size=1,
        num_workers=2,
        sampler=[0] * 10_000,
        multiprocessing_context="fork",
    )
    batches = iter(loader)

    def kill(*workers):
        for worker in workers:
            os.kill(batches._workers[worker].pid, signal.SIGKILL)

    def cut_off(_):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        kill(0)
        raise ConnectionResetError("by the peer")

    raised = None
    try:
        with named_worker_failures():
            for batch, _ in batches:
                assert batch.tolist() == [[4, 3]]
                if how == "cut off":
                    sharer._resource_sharer.get_connection = cut_off
                else:
                    kill(*range(2 if how == "both killed" else 1))
    except Exception as error:
        raised = [type(error).__name__, str(error)]
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    time.sleep(0.2)  # nothing is raised any more, and nothing is printed
    print(json.dumps(raised))


if __name__ == "__main__":
    main(*sys.argv[1:])
