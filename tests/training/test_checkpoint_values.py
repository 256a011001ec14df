import collections
import fractions

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from local_distill import DataError
from local_distill.training.checkpoint_values import check_storable
from local_distill.training.checkpoints import CheckpointStore

Point = collections.namedtuple("Point", "x y")


class OwnTensor(torch.Tensor):
    pass


class OwnInt(int):
    pass


def carrying():
    tensor = torch.zeros(2)
    tensor.note = "mine"
    return tensor


def around():
    inner = []
    inner.append(inner)
    return inner


REFUSED = {
    "an array": (np.zeros(3), r"numpy\.ndarray.*torch\.from_numpy"),
    "a number of numpy": (np.float64(3), r"numpy\.float64.*float\(value\)"),
    "an own int": (OwnInt(3), r"OwnInt.*int\(value\)"),
    "a fraction": (fractions.Fraction(1, 3), "Fraction"),
    "bytes": (b"abc", "is a bytes"),
    "a set": ({1, 2}, "is a set"),
    "a dtype": (torch.float32, r"torch\.dtype.*str\(value\)"),
    "a size": (torch.zeros(2, 3).shape, r"Size.*tuple\(value\)"),
    "a named tuple": (Point(1, 2), r"Point.*tuple\(value\)"),
    "a default dict": (collections.defaultdict(int), r"defaultdict.*dict\(value\)"),
    "a module": (nn.Linear(2, 2), r"Linear.*value\.state_dict\(\)"),
    "a function": (print, "builtin_function_or_method"),
    "an own tensor": (OwnTensor(3), r"OwnTensor.*as_subclass\(torch\.Tensor\)"),
    "attributes": (carrying(), r"attributes, \['note'\].*detach\(\)"),
    "meta": (torch.zeros(2, device="meta"), "meta.*no values"),
    "sparse": (torch.eye(3).to_sparse(), r"to_dense\(\)"),
    "itself": (around(), r"\[0\]` contains itself"),
    "a key": ({"fine": 1, (1, 2): 3}, r"has the key \(1, 2\) of type tuple"),
    "a key's class": ({True: 3}, "has the key True of type bool"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_needs_code_is_refused_by_its_place_and_nothing_is_written(tmp_path, what):
    value, message = REFUSED[what]
    state = {"step": 1, "optimizer": {"groups": [{"lr": 0.1}, {"it": (1, value)}]}}
    place = r"`state\['optimizer'\]\['groups'\]\[1\]\['it'\]\[1\]"
    folder = tmp_path / "checkpoints"
    with pytest.raises(DataError, match=f"{place}.*{message}"):
        CheckpointStore(folder).save(1, state)
    assert not folder.exists()


def test_a_distributed_tensor_is_refused_with_the_way_to_gather_it():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        shard = distribute_tensor(torch.zeros(4), init_device_mesh("cpu", (1,)))
        with pytest.raises(DataError, match=r"\['w'\]` is a .*DTensor.*full_tensor\(\)"):
            check_storable({"w": shard})
    finally:
        torch.distributed.destroy_process_group()


def test_what_a_state_dict_carries_along_is_looked_at():
    state = nn.Linear(2, 2).state_dict()
    assert check_storable({"network": state}) == 24
    state._metadata["hook"] = print
    with pytest.raises(DataError, match=r"state\['network'\]\._metadata\['hook'\]"):
        check_storable({"network": state})
    with pytest.raises(DataError, match="`state` must be a dict, got list"):
        check_storable([])


PLAIN = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text())
TENSORS = st.builds(
    lambda numbers, dtype: torch.tensor(numbers).to(dtype),
    st.lists(st.integers(0, 9), max_size=5),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64]),
)
VALUES = st.recursive(
    PLAIN | TENSORS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
        st.dictionaries(st.text(max_size=5), inner, max_size=3).map(collections.OrderedDict),
    ),
    max_leaves=12,
)


def same(one, other):
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@given(value=VALUES)
def test_whatever_is_accepted_comes_back(tmp_path_factory, value):
    store = CheckpointStore(tmp_path_factory.mktemp("any"))
    store.save(1, {"value": value})
    assert same(store.load().state, {"value": value})
