"""How long a run of several processes outlives one of them, and what it says.

python benchmarks/dead_ranks.py [LAUNCHER:RANKS:VICTIM:HARM[:TIMEOUT] ...]
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from helpers.dead_ranks import harm_one

from local_distill.training.checkpoints import CheckpointStore

WAYS = [
    *(f"{by}:{ranks}:{victim}:kill" for by in ("fabric", "torchrun") for ranks in (2, 3)
      for victim in (0, 1)),
    *(f"{by}:2:{victim}:raise" for by in ("fabric", "torchrun") for victim in (0, 1)),
    *(f"fabric:2:{victim}:stop{more}" for victim in (0, 1) for more in ("", ":15")),
]  # fmt: skip


def main() -> None:
    print("| started by | processes | harm | gone after | status | said |")
    print("|---|---|---|---|---|---|")
    for way in sys.argv[1:] or WAYS:
        launcher, ranks, victim, harm, *timeout = way.split(":")
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "run"
            outcome = harm_one(
                folder, launcher=launcher, ranks=int(ranks), victim=int(victim), harm=harm,
                timeout=float(timeout[0]) if timeout else 1800.0,
            )  # fmt: skip
            last = CheckpointStore(folder / "checkpoints").load()
        assert last is not None
        words = ("error: ", "exitcode  : -")
        said = [line.strip() for line in outcome.said.splitlines() if any(map(line.count, words))]
        more = f", `process_timeout` {timeout[0]} s" if timeout else ""
        print(
            f"| {launcher} | {ranks} | {harm} rank {victim}{more} | {outcome.seconds:.0f} s | "
            f"{outcome.status} | {' · '.join(said)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
