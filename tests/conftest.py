"""Settings for the whole suite."""

import os

import torch
from hypothesis import HealthCheck, settings

# No deadline: these machines are noisy, and a timed test proves nothing. Derandomised in CI so that
# a red run can be repeated.
settings.register_profile(
    "local_distill",
    deadline=None,
    max_examples=40,
    print_blob=True,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("local_distill")
torch.set_num_threads(1)
