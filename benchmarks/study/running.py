"""Runs tasks in a few processes, keeps what is finished, shows how long the rest will take."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

from tqdm import tqdm

from benchmarks.study.pieces import Piece
from benchmarks.study.results_file import append_record, read_records
from benchmarks.study.settings import Preset

__all__ = ["run_tasks"]


def run_tasks(
    preset: Preset,
    tasks: Sequence[Sequence[Piece]],
    results: Path,
    *,
    jobs: int,
    description: str,
    until: float | None = None,
) -> None:
    """Run what is not there yet; returns when all is, or when the time is up.

    Args:
        preset: the settings.
        tasks: pieces that share their views, together.
        results: gets a line for every finished piece.
        jobs: processes; 0: this one alone.
        description: beside the progress bar.
        until: `time.time()` after which no further piece is begun.
    """
    there = read_records(results, preset)
    pieces = {piece for task in tasks for piece in task}
    left = [[piece for piece in task if piece not in there] for task in tasks]
    left = [task for task in left if task]
    done = len(pieces & there.keys())
    bar = tqdm(total=len(pieces), initial=done, desc=description, unit="piece", dynamic_ncols=True)
    with bar:
        if jobs == 0:
            for task in left:
                for piece in task:
                    bar.update(_run_task(preset, [piece], results, until))
            return
        # Started anew and not forked: torch's threads do not survive a fork.
        with ProcessPoolExecutor(
            jobs, multiprocessing.get_context("spawn"), initializer=_one_thread
        ) as pool:
            waiting = {pool.submit(_run_task, preset, task, results, until) for task in left}
            try:
                while waiting:
                    finished, waiting = wait(waiting, timeout=2, return_when=FIRST_COMPLETED)
                    now = len(pieces & read_records(results, preset).keys())
                    bar.update(now - bar.n)
                    for future in finished:
                        future.result()  # an error of a process is one of the study
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _run_task(preset: Preset, task: Sequence[Piece], results: Path, until: float | None) -> int:
    """How many pieces there was time for."""
    from benchmarks.study.run_piece import run_piece

    for number, piece in enumerate(task):
        if until is not None and time.time() >= until:
            return number
        append_record(results, run_piece(preset, piece))
    return len(task)


def _one_thread() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
