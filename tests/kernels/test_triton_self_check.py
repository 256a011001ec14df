"""The self-check passes sound kernels, interpreted, and sees each kind of wrong one."""

from unittest import mock

import pytest
import torch
from helpers.interpreted import interpreted

from local_distill.kernels import triton_self_check as module
from local_distill.kernels.triton_self_check import check_kernels

CPU = torch.device("cpu")


@interpreted
def test_sound_kernels_pass():
    # bfloat16 products give garbage in the interpreter, and only there
    with mock.patch.object(module, "_check_similarities", wraps=skip_bfloat16()) as similar:
        check_kernels(CPU)
    assert similar.call_count == 3


def skip_bfloat16():
    check = module._check_similarities

    def checked(device, dtype, generator):
        if dtype != torch.bfloat16:
            check(device, dtype, generator)

    return checked


def wrong(form, spoil):
    def wrapped(*args, **kwargs):
        return spoil(form(*args, **kwargs), *args)

    return wrapped


def spoiled_loss(found, *args):
    return found * 1.01


def spoiled_slope(found, views, targets, temp, slopes, factor):
    slopes[1][0, 3] = 0.0
    return found


def spoiled_similarity(found, *args):
    return {
        pair: best._replace(teacher_index=(best.teacher_index + 1) % 71)
        for pair, best in found.items()
    }


def spoiled_place(found, *args):
    index, weight, cost = found
    return (index + 1) % 15, weight, cost


def spoiled_weight(found, *args):
    index, weight, cost = found
    return index, weight.masked_fill(index == 3, 0.0), cost


@pytest.mark.parametrize(("name", "spoil", "message"), [
    ("cross_entropy_by_rows", "spoiled_loss", "loss of"),
    ("cross_entropy_by_rows", "spoiled_slope", "slope of"),
    ("most_similar_by_tiles", "spoiled_similarity", "similarity of"),
    ("lattice_matches", "spoiled_place", "squared distance"),
    ("lattice_matches", "spoiled_weight", "leaves out"),
])  # fmt: skip
@interpreted
def test_wrong_kernels_are_seen(name, spoil, message):
    form = wrong(getattr(module, name), globals()[spoil])
    checks = {"cross": "_check_losses", "most_": "_check_similarities", "latti": "_check_lattice"}
    check = getattr(module, checks[name[:5]])
    generator = torch.Generator().manual_seed(0)
    args = (CPU, generator) if name[0] == "l" else (CPU, torch.float32, generator)
    with mock.patch.object(module, name, form), pytest.raises(AssertionError, match=message):
        check(*args)
