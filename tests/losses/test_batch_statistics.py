"""Statistics over the batch; of several processes: test_process_grid.py."""

import torch

from local_distill.losses._batch_statistics import batch_covariance, batch_variance, centered_rows
from local_distill.losses._pairs import Processes

ALONE = Processes(active=False)


def test_moments_are_torchs():
    values = torch.randn(6, 2, 3, dtype=torch.float64) * 2 + 100
    variance, known = batch_variance(values, None, ALONE)
    torch.testing.assert_close(variance, values.var(0))
    assert known.all()
    covariance, _ = batch_covariance(values, None, ALONE)
    for i in range(2):
        torch.testing.assert_close(covariance[i], values[:, i].T.cov())


def test_large_means_cost_no_digits():
    values = torch.randn(64, 1, 3) + 1000
    variance, _ = batch_variance(values, None, ALONE)
    torch.testing.assert_close(variance, values.double().var(0).float(), rtol=1e-5, atol=0)


def test_positions_count_what_is_valid():
    values = torch.randn(4, 3, 2)
    valid = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
    rows, count = centered_rows(torch.where(valid[..., None], values, torch.nan), valid, ALONE)
    assert count.tolist() == [3, 1, 0]
    assert (rows[~valid] == 0).all()
    _, known = batch_variance(values, valid, ALONE)
    assert known.tolist() == [True, False, False]
