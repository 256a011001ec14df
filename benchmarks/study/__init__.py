"""The study: does matching by place help, does it where data is scarce, do lower layers gain?

    python -m benchmarks.study                 # the CPU-sized one: 3 hours on two cores at most
    python -m benchmarks.study --preset smoke  # a minute, to see that all of it runs
    python -m benchmarks.study --tables        # nothing is trained: the tables of what is there

Each finished piece (one training and its evaluation) is a line of ``results/PRESET.jsonl``. A
second call goes on with what is missing; a piece that was killed is repeated. What came out is in
docs/training/study.md.
"""
