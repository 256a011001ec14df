"""The formulas of docs/training/processes.md, against what two processes hold and send."""

import json

import pytest
from helpers.training_ranks import methods, train_on_processes

from local_distill.training.cost_formulas import NetworkCounts, held_bytes, sent_bytes
from local_distill.training.options import BackboneOptions

# method, strategy, micro-batches; how often a step runs the student's backbone and the teacher's
CASES = {
    "Glsd": ("Glsd", "auto", 1, 2, 1),
    "Glsd, sharded": ("Glsd", "fsdp", 1, 2, 1),
    "Glsd, sharded, twice": ("Glsd", "fsdp", 2, 2, 1),
    "Glsd, twice": ("Glsd", "auto", 2, 2, 1),
    "Densecl": ("Densecl", "auto", 1, 1, 1),
    "SdsslSimclr": ("SdsslSimclr", "auto", 1, 2, 0),
    "SdsslSimclr, sharded": ("SdsslSimclr", "fsdp", 1, 2, 0),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("costs")
    cases = [
        {"run": name, "measure": True, "method": method, "strategy": strategy, "accumulate": micro}
        for name, (method, strategy, micro, _, _) in CASES.items()
    ]
    train_on_processes(folder, [{"ranks": 2, "cases": cases}])
    return folder


def counted(method):
    size = {"img_size": 16, "patch_size": 8, "width": 24, "depth": 2}
    chosen, _ = methods()[method]
    backbone = BackboneOptions(kwargs=size).build(layers=chosen.wants_layers)
    return NetworkCounts.of(chosen.build(backbone, 9)[0])


@pytest.mark.parametrize("name", CASES)
def test_what_is_held_and_sent(folder, name):
    method, strategy, micro, student, teacher = CASES[name]
    said = [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(2)]
    counts, sharded = counted(method), strategy == "fsdp"
    held = held_bytes(counts, processes=2, sharded=sharded, has_teacher=teacher > 0)
    for part in ("parameters", "gradients", "moments", "teacher"):
        # shares are unequal where a first axis is odd: on average they are what the formula says
        real = sum(one["held"][part] for one in said) / 2
        assert real == pytest.approx(getattr(held, part), rel=1e-9), part
    centers = (16, 16) if method == "Glsd" else ()
    keys = 2 * 2 * 8 if method == "Densecl" else 0  # two queues, two images, eight numbers
    sent = sent_bytes(
        counts, processes=2, sharded=sharded, accumulate=micro, student_passes=student,
        teacher_passes=teacher, center_sizes=centers, gathered=keys,
    )  # fmt: skip
    real = said[0]["sent"]
    if sharded:
        # FSDP2 fills shares up where a first axis is odd
        assert real["_allgather_base_"] == pytest.approx(sent.parameters, rel=0.01)
    else:
        assert not {"_allgather_base_", "_reduce_scatter_base_"} & set(real)
    if method == "Densecl":
        assert real["allgather_"] == sent.keys
    # SdsslSimclr's BatchNorms gather whole rows on a CPU, whose gradient is reduced
    reduced = real["allreduce_"] + real.get("_reduce_scatter_base_", 0)
    wanted = sent.gradients + sent.centers
    assert reduced == pytest.approx(wanted, rel=0.08 if method == "SdsslSimclr" else 0.01)
