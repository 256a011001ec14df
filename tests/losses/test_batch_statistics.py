"""Several processes are one: statistics of the whole batch, and their gradients."""

import pytest
import torch
from helpers.batch_statistics_processes import LOSSES, batch, results_of, run, value_of

from local_distill import Matches
from local_distill.losses._batch_statistics import batch_covariance, batch_variance, centered_rows
from local_distill.losses._pairs import Processes

ALONE = Processes(active=False)
# What looks at its own process alone is not what one process with the whole batch gives.
WITHIN = ("koleo", "gram-batch")
SIZES = [(4, 4), (6, 2), (7, 1), (8, 0), (3, 0, 5)]
CASES = tuple((name, sizes) for sizes in SIZES for name in LOSSES)


def result_of(name, sizes):
    return results_of(len(sizes), tuple(c for c in CASES if len(c[1]) == len(sizes)))[name, sizes]


def gradients(results):
    """The ranks' gradients put together, as data-parallel wrappers average them."""
    found = []
    for v, tokens in enumerate((5, 4)):
        shares = [torch.tensor(r["gradients"][v], dtype=torch.float64) for r in results]
        found.append(torch.cat([share.reshape(-1, tokens, 3) for share in shares]) / len(results))
    return found


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", [name for name in LOSSES if name not in WITHIN])
def test_processes_agree_with_one(name, sizes):
    truth = run(name, sum(sizes), slice(0, sum(sizes)))
    results = result_of(name, sizes)
    assert len(results) == len(sizes)
    for result in results:
        assert result["value"] == pytest.approx(truth["value"], rel=1e-12)
        assert result["value"] == results[0]["value"]
    assert any(torch.tensor(gradient).abs().max() > 1e-3 for gradient in truth["gradients"])
    for found, wanted in zip(gradients(results), truth["gradients"], strict=True):
        torch.testing.assert_close(
            found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", WITHIN)
def test_what_stays_within_a_process_is_weighed_by_its_share(name, sizes):
    tokens, matches, valid, references = batch(sum(sizes))
    tokens = [view.requires_grad_() for view in tokens]
    loss = LOSSES[name]().eval()
    first, parts = 0, []
    for size in sizes:
        mine, first = slice(first, first + size), first + size
        found = [Matches(*(part[mine] for part in one)) for one in matches]
        share = [view[mine] for view in tokens]
        if name == "koleo":
            counts = [int(valid[mine].sum()), size]
            values = [loss(share[v][:, 0], flags) for v, flags in enumerate((valid[mine], None))]
            parts.append(
                [(c if c > 1 else 0, value) for c, value in zip(counts, values, strict=True)]
            )
        else:
            terms = sum(int((one.mass > 0).sum()) for one in found) ** 2
            parts.append([(terms, value_of(loss, name, share, found, valid[mine], references))])
    truth = torch.stack(
        [
            sum(c * value for c, value in part) / sum(c for c, _ in part)
            for part in zip(*parts, strict=True)
        ]
    ).mean()
    wanted = torch.autograd.grad(truth, tokens)
    results = result_of(name, sizes)
    for result in results:
        assert result["value"] == pytest.approx(float(truth.detach()), rel=1e-12)
    torch.testing.assert_close(gradients(results), list(wanted), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", list(LOSSES))
def test_nothing_is_sent_in_evaluation(name):
    first = result_of(name, (6, 2))[0]
    tokens, matches, valid, references = batch(8)
    found = [Matches(*(part[:6] for part in one)) for one in matches]
    share = [view[:6] for view in tokens]
    alone = float(value_of(LOSSES[name](), name, share, found, valid[:6], references))
    assert first["eval"] == pytest.approx(alone, rel=1e-12)
    assert first["alone"] == pytest.approx(alone, rel=1e-12)


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
