"""``python -m benchmarks matchers|losses|transforms|step|compare``: see docs/benchmarks."""

import sys

from local_distill.benchmarking.command import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m benchmarks"))
