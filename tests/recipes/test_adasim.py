"""AdaSim's recipe gives the published numbers, and its sampler votes as published."""

import copy
import importlib.util
import math
from pathlib import Path

import pytest
import torch
from helpers.processes import said_by_all
from hypothesis import given
from hypothesis import strategies as st

from local_distill import ConfigError, ShapeError, ViewOutput
from local_distill.neighbour_sampler import NeighbourSampler
from local_distill.recipes.adasim import adasim

WORKER = Path(__file__).with_name("sampler_worker.py")
IMAGES, FEATURES, PROTOTYPES, TOP, VOTES, BATCH = 12, 5, 7, 4, 3, 4


def waves(*shape, phase):
    steps = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(steps**1.3 * 0.7 + phase).reshape(shape)


def test_the_authors_numbers():
    # their loss, state and choice (tileb1/AdaSim, float64, one process) for these views, 5 epochs
    # of 3 steps, teacher temperature 0.04, 0.045, 0.05, 0.05, 0.05, sampling temperature 0.02: the
    # last step's loss and norms of gradients, the center's norm, then what each image may be shown
    # beside: its first three candidates' chances where it finds itself first, none where not
    recipe = adasim(
        IMAGES, FEATURES, PROTOTYPES, top_k=TOP, votes=VOTES, neighbour_temp=0.02
    ).double()
    base = waves(IMAGES, FEATURES, phase=99)
    for epoch in range(5):
        order = (torch.arange(IMAGES) * 5 + epoch) % IMAGES
        for step in range(IMAGES // BATCH):
            index = order[step * BATCH : (step + 1) * BATCH]
            features = base[index] + 0.6 * waves(BATCH, FEATURES, phase=7 * epoch + step)
            start = epoch + 10 * step
            student = [waves(BATCH, PROTOTYPES, phase=start + v).requires_grad_() for v in range(2)]
            teacher = [
                waves(BATCH, PROTOTYPES, phase=start + 20 + v).requires_grad_() for v in range(2)
            ]
            terms = recipe(
                [ViewOutput(logits) for logits in student],
                [ViewOutput(logits) for logits in teacher],
                teacher_temp=min(0.04 + 0.005 * epoch, 0.05),
                index=index,
                features=features,
            )
        recipe.sampler.end_epoch()
        if epoch + 1 < VOTES:
            assert not recipe.sampler.distribution(order).adaptive.any()
    terms.loss.backward()
    assert all(logits.grad is None for logits in teacher)
    reached = [float(terms.loss.detach()), *(float(logits.grad.norm()) for logits in student)]
    assert reached == pytest.approx(
        [7.242056344908479, 2.939094959062712, 1.2365058065565209], rel=1e-9
    )
    center = float(recipe.global_loss.targets.center.norm())
    assert center == pytest.approx(0.045384792069648364, rel=1e-9)
    found = recipe.sampler.distribution(torch.arange(IMAGES))
    candidates = {
        0: [0, 1, 7, 3], 1: [1, 0, 3, 4], 2: [2, 9, 6, 5], 3: [3, 8, 11, 0], 4: [4, 7, 6, 8],
        10: [10, 5, 6, 7], 11: [11, 8, 9, 3],
    }  # fmt: skip
    for image in range(IMAGES):
        wanted = candidates.get(image, [image] * TOP)
        assert found.candidates[image].tolist() == wanted
        assert bool(found.adaptive[image]) is (image in candidates)
    chances = [
        [0.9931776992824981, 0.00682229060576141, 6.428651804545268e-09],
        [0.9828742619343134, 0.015514644029040101, 0.0016110940366014692],
        [0.995921394030287, 0.003950610615122771, 0.00012071442105397581],
    ]
    for image, wanted in zip((3, 10, 11), chances, strict=True):
        assert found.probs[image, :3].tolist() == pytest.approx(wanted, rel=1e-9)


def plain_distribution(votes, image, top, temp, number):
    """Votes of one image as dictionaries; None where it does not find itself first."""
    sums = {}
    for vote in votes:
        for other, similarity in vote:
            sums[other] = sums.get(other, 0.0) + similarity
    ranked = sorted(sums.items(), key=lambda item: -item[1])[:top]
    if not ranked or ranked[0][0] != image:
        return None
    masses = [math.exp((value - ranked[0][1]) / number / temp) for _, value in ranked]
    return {other: mass / sum(masses) for (other, _), mass in zip(ranked, masses, strict=True)}


@given(
    images=st.integers(2, 7),
    top=st.integers(1, 4),
    votes=st.integers(1, 3),
    epochs=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_votes_are_the_plain_ones(images, top, votes, epochs, seed):
    top = min(top, images)
    g = torch.Generator().manual_seed(seed)
    sampler = NeighbourSampler(images, feature_dim=3, top_k=top, votes=votes, temp=0.3).double()
    base = torch.randn(images, 3, generator=g, dtype=torch.float64)
    bank, current, cast = {}, {image: [] for image in range(images)}, []
    for _ in range(epochs):
        seen = torch.randperm(images, generator=g)[: max(1, images - 1)]
        features = base[seen] + 0.5 * torch.randn(len(seen), 3, generator=g, dtype=torch.float64)
        for rows in torch.arange(len(seen)).split(2):
            sampler.observe(seen[rows], features[rows])
            fresh = {}
            for row in rows.tolist():
                unit = features[row] / features[row].norm()
                scores = sorted(((float(unit @ bank[j]), j) for j in bank), reverse=True)
                current[int(seen[row])] = [(j, score) for score, j in scores[:top]]
                fresh[int(seen[row])] = unit
            bank.update(fresh)
        sampler.end_epoch()
        cast.append(copy.deepcopy(current))
    found = sampler.distribution(torch.arange(images))
    torch.testing.assert_close(found.probs.sum(1), torch.ones(images, dtype=torch.float64))
    for image in range(images):
        wanted = None
        if epochs >= votes:
            own = [vote[image] for vote in cast[-votes:]]
            wanted = plain_distribution(own, image, top, 0.3, votes)
        got = {}
        for other, chance in zip(
            found.candidates[image].tolist(), found.probs[image].tolist(), strict=True
        ):
            got[other] = got.get(other, 0.0) + chance
        assert bool(found.adaptive[image]) is (wanted is not None)
        for other, chance in (wanted or {image: 1.0}).items():
            assert got[other] == pytest.approx(chance, abs=1e-9)


def trained(**settings):
    """A sampler whose images 0 and 1, 2 and 3, … are much alike."""
    options = {"feature_dim": 4, "top_k": 2, "votes": 2, "temp": 0.1, **settings}
    sampler = NeighbourSampler(6, **options)
    features = torch.eye(4)[torch.tensor([0, 0, 1, 1, 2, 2])]
    features = features + 0.1 * waves(6, 4, phase=3).float()
    for _ in range(3):
        sampler.observe(torch.arange(6), features)
        sampler.end_epoch()
    return sampler


def test_draws_follow_the_distribution_and_their_generator():
    sampler = trained()
    index = torch.tensor([0, 3]).repeat_interleave(4000)
    drawn = sampler.draw(index, generator=torch.Generator().manual_seed(0))
    again = sampler.draw(index, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)
    found = sampler.distribution(torch.tensor([0, 3]))
    assert found.adaptive.all()
    for row, part in enumerate(drawn.split(4000)):
        assert set(part.tolist()) == set(found.candidates[row].tolist())
        share = float((part == found.candidates[row, 1]).float().mean())
        assert share == pytest.approx(float(found.probs[row, 1]), abs=0.04)
    assert sampler.draw(index[:0]).shape == (0,)


def test_an_image_that_no_longer_finds_itself_keeps_its_own_view():
    sampler = trained(votes=1)
    assert sampler.distribution(torch.arange(6)).adaptive.all()
    sampler.observe(torch.tensor([0]), sampler.features[2:3].clone())  # looks like another one
    sampler.end_epoch()
    found = sampler.distribution(torch.arange(6))
    assert found.adaptive.tolist() == [False, True, True, True, True, True]
    assert sampler.draw(torch.zeros(50, dtype=torch.int64)).unique().tolist() == [0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, 1e300])
def test_what_is_not_finite_never_enters(bad):
    sampler = trained()
    before = copy.deepcopy(sampler.state_dict())
    features = torch.full((2, 4), bad, dtype=torch.float64)
    sampler.observe(torch.tensor([1, 5]), features)
    after = sampler.state_dict()
    assert int(after.pop("skipped")) == int(before.pop("skipped")) + 2
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    # a good row of the same image counts all the same, wherever it stands
    good = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    for rows in ((good, features[:1].float()), (features[:1].float(), good)):
        other = trained()
        other.observe(torch.tensor([1, 1]), torch.cat(rows))
        torch.testing.assert_close(other.features[1], good[0] / good.norm())


def test_of_an_image_that_comes_twice_the_last_counts():
    twice, once = trained(), trained()
    rows = waves(3, 4, phase=1).float()
    twice.observe(torch.tensor([2, 4, 2]), rows)
    once.observe(torch.tensor([4, 2]), rows[1:])
    for name, value in once.state_dict().items():
        assert torch.equal(twice.state_dict()[name], value), name


def test_state_comes_back_and_stays_wide():
    sampler = trained()
    fresh = NeighbourSampler(6, feature_dim=4, top_k=2, votes=2, temp=0.1)
    fresh.load_state_dict(sampler.state_dict())
    index = torch.arange(6)
    for other in (fresh, copy.deepcopy(sampler), copy.deepcopy(sampler).half()):
        for part, wanted in zip(
            other.distribution(index), sampler.distribution(index), strict=True
        ):
            assert torch.equal(part, wanted)
    assert copy.deepcopy(sampler).to(torch.bfloat16).features.dtype == torch.float32
    assert "votes=2" in repr(sampler)


def test_the_sampler_watches_in_training_only():
    recipe = adasim(6, 4, 3, top_k=2, votes=1)
    views = [ViewOutput(torch.randn(2, 3)) for _ in range(2)]
    more = {"teacher_temp": 0.04, "index": torch.tensor([0, 1]), "features": torch.randn(2, 4)}
    with torch.no_grad():
        recipe(views, views, **more)
    recipe.eval()(views, views, **more)
    assert not recipe.sampler.known.any()
    recipe.train()(views, views, **more)
    assert recipe.sampler.known.tolist() == [True, True, False, False, False, False]
    fresh = adasim(6, 4, 3, top_k=2, votes=1)
    fresh.load_state_dict(recipe.state_dict())
    assert torch.equal(fresh.sampler.features, recipe.sampler.features)


def test_processes_hold_the_state_of_one():
    sizes = [6, 2, 0]
    spec = importlib.util.spec_from_file_location("sampler_worker", WORKER)
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    states = said_by_all(WORKER, len(sizes), sizes=sizes)
    wanted = alone.observed(sizes).state_dict()
    for state in states:
        assert state == states[0]
        for name, value in wanted.items():
            found = torch.tensor(state[name], dtype=value.dtype)
            if value.is_floating_point():
                torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-6)
            else:
                assert torch.equal(found, value), name
    assert int(wanted["skipped"]) > 0


def test_a_step_compiles_whole():
    plain = adasim(6, 4, 3, top_k=2, votes=1)
    other = copy.deepcopy(plain)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    views = [ViewOutput(torch.randn(2, 3)) for _ in range(2)]
    more = {"teacher_temp": 0.04, "index": torch.tensor([0, 1]), "features": torch.randn(2, 4)}
    for _ in range(2):
        torch.testing.assert_close(
            compiled(views, views, **more).loss, plain(views, views, **more).loss
        )
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value)


def test_bad_input_is_refused():
    sampler = trained()
    features = torch.randn(2, 4)
    for index, text in (
        (torch.tensor([0, 6]), "`index` must lie"),
        (torch.tensor([-1, 0]), "`index` must lie"),
        (torch.tensor([0.0, 1.0]), "`index` must be int64"),
        (torch.tensor([0, 1, 2]), "axis `b`"),
    ):
        with pytest.raises(ShapeError, match=text):
            sampler.observe(index, features)
    with pytest.raises(ShapeError, match="feature_dim=4"):
        sampler.observe(torch.tensor([0, 1]), torch.randn(2, 3))
    with pytest.raises(ShapeError, match="`index` must lie"):
        sampler.draw(torch.tensor([9]))
    for settings, text in (
        ({"top_k": 7}, "`top_k`"),
        ({"votes": 0}, "`votes`"),
        ({"temp": 0.0}, "`temp`"),
        ({"feature_dim": 0}, "`feature_dim`"),
    ):
        with pytest.raises(ConfigError, match=text):
            NeighbourSampler(6, **{"feature_dim": 2, "top_k": 2, **settings})
    recipe = adasim(6, 4, 3, top_k=2)
    views = [ViewOutput(torch.randn(2, 3)) for _ in range(2)]
    more = {"teacher_temp": 0.04, "index": torch.tensor([0, 1]), "features": features}
    with pytest.raises(ShapeError, match=r"`teacher\[0\]` has no `global_logits`"):
        recipe(views, [ViewOutput()] * 2, **more)
    with pytest.raises(ConfigError, match="teacher_temp"):
        recipe(views, views, **{**more, "teacher_temp": 0.0})
    with pytest.raises(TypeError):
        adasim(6, 4, epochs=3)
