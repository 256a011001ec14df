"""Measures, and draws the pictures of docs/benchmarks/costs.md.

    python docs/pictures/make_benchmarks.py [PICTURE ...]

All take some ten minutes of a CPU with two cores, on which nothing else should run.
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BENCH = ["-m", "benchmarks"]
COMMANDS = {
    "bench-losses.png": [*BENCH, "losses", "--batch", "8", "--threads", "1", "--repeats", "7"],
    "bench-matchers.png": [*BENCH, "matchers", "--threads", "1"],
    "scaling.png": ["benchmarks/scaling.py", "--repeats", "3"],
}


def main(pictures):
    for picture in pictures or COMMANDS:
        command = [sys.executable, *COMMANDS[picture], "--plot", str(HERE / picture)]
        subprocess.run(command, check=True, cwd=ROOT)


if __name__ == "__main__":
    main(sys.argv[1:])
