"""A training run on several processes, one of which comes to harm; as a script it is the run."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parents[1]
HARM = ("kill", "raise", "stop")


class Outcome(NamedTuple):
    seconds: float  # until the last process was gone
    status: int  # of what was started
    said: str  # on stderr


def harm_one(folder, *, launcher, ranks, victim, harm, timeout=1800.0):
    """Start a run, harm one of its ranks once a checkpoint is there, and see how it ends.

    Args:
        folder: of the run.
        launcher: "fabric": as ``--devices`` does; or "torchrun".
        harm: "kill": SIGKILL; "raise": an error in its loader; "stop": SIGSTOP.
        timeout: the run's ``process_timeout``.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"},
        **{"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    }
    command = [sys.executable]
    if launcher == "torchrun":
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [__file__, str(folder), str(ranks), str(victim), harm, str(timeout)]
    with (folder.parent / f"{folder.name}.txt").open("w+") as said:
        run = subprocess.Popen(
            command, env=environment, stdout=said, stderr=said, start_new_session=True
        )
        try:
            pids = _wait_for_a_checkpoint(folder, ranks, run)
            start = time.monotonic()
            if harm == "raise":
                (folder / "raise").touch()
            else:
                os.kill(pids[victim], signal.SIGKILL if harm == "kill" else signal.SIGSTOP)
            while run.poll() is None or any(map(_lives, pids)):
                time.sleep(0.1)
                assert time.monotonic() - start < 120, "it goes on after two minutes"
            seconds = time.monotonic() - start
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
                run.wait()
        said.seek(0)
        return Outcome(seconds, run.returncode, said.read())


def _wait_for_a_checkpoint(folder, ranks, run):
    files = [folder / f"pid-{rank}" for rank in range(ranks)]
    while not (
        all(file.exists() and file.read_text() for file in files)
        and any((folder / "checkpoints").glob("*.ckpt"))
    ):
        assert run.poll() is None, "it ended before it was harmed"
        time.sleep(0.2)
    return [int(file.read_text()) for file in files]


def _lives(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def _main(folder, ranks, victim, harm, timeout):
    from helpers import training_ranks
    from local_distill import LocalDistillError
    from local_distill.training.processes import make_fabric

    folder, ranks = Path(folder), int(ranks)

    class Harmful(list):
        """Images that come slowly, and one process's loader that fails when it is told to."""

        def __getitem__(self, number):
            if isinstance(number, slice):
                return self
            rank = os.environ.get("LOCAL_RANK", "0")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"pid-{rank}").write_text(str(os.getpid()))
            if harm == "raise" and rank == victim and (folder / "raise").exists():
                raise KeyError("no such image")
            time.sleep(0.02)
            return super().__getitem__(number)

    images = Harmful(training_ranks.scenes())
    training_ranks.scenes = lambda: images
    fabric = make_fabric(accelerator="cpu", devices=ranks, timeout=float(timeout))
    settings = {"precision": "32-true", "steps": 10_000, "save_every": 2}
    try:  # as the command does
        training_ranks.run_case(
            folder.parent, run=folder.name, ranks=ranks, fabric=fabric, **settings
        )
    except LocalDistillError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    _main(*sys.argv[1:])
