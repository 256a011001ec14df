"""A process that dies ends the others, which say why; more ways are in benchmarks/dead_ranks.py."""

from helpers.dead_ranks import harm_one

from local_distill.training.checkpoints import CheckpointStore


def test_a_killed_process_ends_all_and_is_named(tmp_path):
    folder = tmp_path / "run"
    outcome = harm_one(folder, launcher="fabric", ranks=2, victim=1, harm="kill")
    # harm_one returns once all are gone; it gives them two minutes, and the page says what it takes
    assert outcome.status != 0
    assert "was ended by signal 9 (SIGKILL)" in outcome.said
    assert "rank 1 (process " in outcome.said
    assert CheckpointStore(folder / "checkpoints").load().step >= 2
