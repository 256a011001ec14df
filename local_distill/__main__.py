"""``python -m local_distill`` is the command ``local-distill``."""

from __future__ import annotations

import sys

from local_distill.training.cli import main

if __name__ == "__main__":
    sys.exit(main())
