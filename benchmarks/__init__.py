"""Benchmarks of the repository; ``python -m benchmarks`` is the command ``local-distill bench``."""
