"""Settings for the whole suite."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# No deadline: these machines are noisy, and a timed test proves nothing. Derandomised in CI so that
# a red run can be repeated; fewer there too, as it looks at the same ones each time.
settings.register_profile(
    "local_distill",
    deadline=None,
    max_examples=15 if os.environ.get("CI") else 40,
    print_blob=True,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("local_distill")
torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What a test draws must not depend on which tests ran before it in the same process."""
    torch.manual_seed(0)
