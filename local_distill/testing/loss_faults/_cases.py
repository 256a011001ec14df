"""Where the cases of losses are declared."""

from __future__ import annotations

from local_distill.testing.fault_tables import FaultCases

CASES = FaultCases()
