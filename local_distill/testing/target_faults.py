"""A table of faults: what targets make of each kind of bad or extreme input.

The targets' rows of `fault_tables`.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from local_distill.testing.fault_tables import FaultCases, FaultResult, NotApplicable
from local_distill.testing.properties import ensure
from local_distill.testing.target_properties._registry import (
    TargetsFactory,
    ensure_same_state,
    numbers_of,
    probs_of,
    state_of,
)

__all__ = ["TargetsOracle", "target_faults"]

Views = list[Tensor]
TargetsOracle = Callable[[Sequence[Views], Views, float], Sequence[Tensor]]
_CASES = FaultCases()
_case = _CASES.case
_DIM = 5
_TEMP = 0.1


class _Subject(NamedTuple):
    make: TargetsFactory
    oracle: TargetsOracle | None


def target_faults(
    targets: TargetsFactory,
    *,
    oracle: TargetsOracle | None = None,
    groups: Iterable[str] | None = None,
    not_applicable: Mapping[str, str] | None = None,
) -> list[FaultResult]:
    """Try every fault on targets.

    Args:
        targets: makes targets for a number of prototypes, such as the class `Centering`. Every call
            that is tried gets new ones.
        oracle: ``oracle(updates, teacher_logits, teacher_temp)`` gives each view's distributions
            after these updates, the truth, in float64; None: the targets themselves in float64.
        groups: only these groups of faults; ``"compile"`` takes longer than all the others.
        not_applicable: ``{fault: reason}`` of cases that are no fault for these targets.

    Returns:
        One `FaultResult` for each case. Sound targets have no ``"WRONG"``.

    Raises:
        ConfigError: a group or a fault that does not exist.

    Example:
        >>> from local_distill import Centering
        >>> results = target_faults(Centering, groups=["layout"])
        >>> [f"{result.fault}: {result.outcome}" for result in results][:2]
        ['non-contiguous: right', 'expanded: right']
    """
    subject = _Subject(targets, oracle)
    return _CASES.run(subject, groups=groups, not_applicable=not_applicable)


def _new(subject: _Subject, dim: int = _DIM, dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = subject.make(dim)
    return made.double() if dtype == torch.float64 else made


def _updated(subject: _Subject, *steps: Views) -> Any:
    dtype = steps[0][0].dtype if steps else torch.float32
    made = _new(subject, steps[0][0].shape[-1] if steps else _DIM, dtype)
    for step in steps:
        made.update(step)
    return made


def _drawn(seed: int, *, sizes: Sequence[int] = (6, 4), images: int = 3, dim: int = _DIM) -> Views:
    """Views of tokens, whose mean a center notices."""
    generator = torch.Generator().manual_seed(seed)
    tilt = torch.linspace(-0.5, 1.0, dim)
    return [torch.randn(images, n, dim, generator=generator) + tilt for n in sizes]


def _cast(views: Views, dtype: torch.dtype) -> Views:
    return [view.to(dtype) for view in views]


def _ensure_right(
    subject: _Subject,
    updates: Sequence[Views],
    logits: Views,
    what: str,
    *,
    temp: float = _TEMP,
    atol: float = 1e-5,
) -> None:
    """Refuse distributions that are off by more than ``atol`` after these updates."""
    dim, dtype = logits[0].shape[-1], logits[0].dtype
    made = _updated(subject, *updates) if updates else _new(subject, dim, dtype)
    found = probs_of(made, logits, temp)
    steps = [_cast(step, torch.float64) for step in updates]
    wide = _cast(logits, torch.float64)
    if subject.oracle is not None:
        wanted = list(subject.oracle(steps, wide, temp))
    else:
        exact = _updated(subject, *steps) if steps else _new(subject, dim, torch.float64)
        wanted = probs_of(exact, wide, temp)
        _ensure_distributions(wanted, what)
    ensure(len(found) == len(wanted), f"{what}: {len(found)} views instead of {len(wanted)}")
    kind = torch.promote_types(dtype, torch.float32)
    for view, (one, two) in enumerate(zip(found, wanted, strict=True)):
        ensure(one.dtype == kind, f"{what}: probs of view {view} are {one.dtype}, not {kind}")
        ensure(one.shape == two.shape, f"{what}: view {view} has shape {tuple(one.shape)}")
        if one.numel():
            off = float((one.double() - two).abs().nan_to_num(torch.inf).max())
            ensure(off <= atol, f"{what}: probs of view {view} are off by {off:.3g}")


def _ensure_distributions(views: Sequence[Tensor], what: str) -> None:
    for view, probs in enumerate(views):
        sums = probs.double().sum(-1)
        fine = bool((probs >= 0).all()) and bool((sums - 1).abs().le(1e-5).all())
        ensure(fine, f"{what}: view {view} holds no distributions")


def _ensure_goes_on(one: Any, two: Any, what: str, *, share: float = 0.0) -> None:
    """Refuse targets that differ now, or after two more updates."""
    for seed in (8, 9):
        logits = _drawn(seed)
        for view, (found, wanted) in enumerate(
            zip(probs_of(one, logits, _TEMP), probs_of(two, logits, _TEMP), strict=True)
        ):
            same = torch.allclose(found, wanted, rtol=0, atol=share)
            ensure(same, f"{what}: probs of view {view} differ")
        one.update(logits)
        two.update(logits)


def _needs_state(subject: _Subject) -> None:
    if not numbers_of(_new(subject)):
        raise NotApplicable("keeps no state")


# Numbers


def _precision(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")

    @_case("numbers", name)
    def case(subject: _Subject) -> None:
        updates = [_cast(_drawn(seed), dtype) for seed in (1, 2)]
        _ensure_right(subject, updates, _cast(_drawn(3), dtype), name)


for _dtype in (torch.float16, torch.bfloat16, torch.float32):
    _precision(_dtype)


@_case("numbers", "float64 is kept")
def _float64(subject: _Subject) -> None:
    updates = [_cast(_drawn(1), torch.float64)]
    _ensure_right(subject, updates, _cast(_drawn(2), torch.float64), "float64", atol=1e-9)


def _size(title: str, factor: float, dtype: torch.dtype = torch.float32) -> None:
    @_case("numbers", title)
    def case(subject: _Subject) -> None:
        views = [(factor * view).clamp(-6e4, 6e4).to(dtype) for view in _drawn(4)]
        # What float32 says of a logit over its temperature is as uncertain as its rounding.
        largest = max(float(view.double().abs().max()) for view in views) / _TEMP
        atol = max(1e-5, 4 * 2.0**-24 * largest)
        _ensure_right(subject, [], views, title, atol=atol)
        made = _updated(subject, views)
        _ensure_distributions(probs_of(made, views, _TEMP), title)


for _factor in (10, 100, 2000):
    _size(f"values × {_factor:,}", _factor)
_size("float16 values up to ±60,000", 3e4, torch.float16)


@_case("numbers", "autocast")
def _autocast(subject: _Subject) -> None:
    plain, under = _updated(subject, _drawn(1)), _new(subject)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under.update(_drawn(1))
        found = probs_of(under, _drawn(2), _TEMP)
    for one, two in zip(found, probs_of(plain, _drawn(2), _TEMP), strict=True):
        ensure(torch.allclose(one, two, rtol=0, atol=1e-6), "autocast changes the probs")


@_case("numbers", "float16 sums over 12,544 tokens of mean 8")
def _long_sums(subject: _Subject) -> None:
    many = [(view + 8).half() for view in _drawn(5, images=64, sizes=(196,), dim=4)]
    _ensure_right(subject, [many], many, "12,544 tokens", atol=1e-4)


def _bad(title: str, bad: float) -> None:
    @_case("numbers", title)
    def case(subject: _Subject) -> None:
        spoilt = _drawn(6)
        spoilt[0][0, 0, 1] = bad
        skipping, clean = _updated(subject, _drawn(1)), _updated(subject, _drawn(1))
        probs = probs_of(skipping, spoilt, _TEMP)
        rest = [probs[0][1:], *probs[1:]]
        _ensure_distributions(rest, f"beside {title}")
        skipping.update(spoilt)
        for name, part in state_of(skipping).items():
            ensure(bool(part.isfinite().all()), f"`{name}` is not finite after {title}")
        _ensure_goes_on(skipping, clean, f"after {title}")


_bad("NaN in the teacher", torch.nan)
_bad("infinity in the teacher", torch.inf)
_bad("minus infinity in the teacher", -torch.inf)


@_case("numbers", "values of 6 and more at temperature 0.04")
def _sharp(subject: _Subject) -> None:
    views = [6 * view + 6 for view in _drawn(7)]
    _ensure_right(subject, [], views, "temperature 0.04", temp=0.04, atol=1e-4)


@_case("numbers", "temperature 0 and below")
def _cold(subject: _Subject) -> None:
    refusals: list[Exception] = []
    for temp in (0.0, -0.1, float("nan")):
        try:
            _new(subject)(_drawn(1), teacher_temp=temp)
        except ValueError as error:
            refusals.append(error)
            continue
        raise AssertionError(f"a temperature of {temp} was taken")
    raise refusals[0]


@_case("numbers", "c = 1")
def _one(subject: _Subject) -> None:
    _ensure_right(subject, [_drawn(1, dim=1)], _drawn(2, dim=1), "c = 1")


@_case("numbers", "all rows alike")
def _alike(subject: _Subject) -> None:
    row = torch.tensor([0.5, -1.0, 2.0, 0.25, 1.5])
    views = [row.expand(3, 4, 5).clone()]
    _ensure_right(subject, [views], views, "all rows alike")


# Views


def _views(title: str, views: Views) -> None:
    @_case("views", title)
    def case(subject: _Subject) -> None:
        _ensure_right(subject, [views], views, title)


_views("one view", _drawn(11, sizes=(6,)))
_views("whole views", [view[:, 0] for view in _drawn(12, images=7)])
_views("three sizes", _drawn(13, sizes=(6, 1, 9)))
_views("batch of 1", _drawn(14, images=1))


@_case("views", "batch of 0")
def _no_image(subject: _Subject) -> None:
    made, clean = _updated(subject, _drawn(1)), _updated(subject, _drawn(1))
    empty = _drawn(15, images=0)
    shapes = [tuple(probs.shape) for probs in probs_of(made, empty, _TEMP)]
    ensure(shapes == [(0, 6, 5), (0, 4, 5)], f"the probs have shapes {shapes}")
    made.update(empty)
    _ensure_goes_on(made, clean, "after an update without images")


@_case("views", "other prototypes than it was made for")
def _prototypes(subject: _Subject) -> None:
    made = _new(subject, 16)
    made.update(_drawn(16, dim=1))
    made(_drawn(16, dim=1), teacher_temp=_TEMP)
    raise AssertionError("c = 1 was broadcast to 16")


@_case("views", "a tensor in place of a list")
def _bare(subject: _Subject) -> None:
    _new(subject)(_drawn(17)[0][None], teacher_temp=_TEMP)
    raise AssertionError("a bare tensor was cut into views along its batch")


@_case("views", "`valid` of 1 image against 3")
def _valid(subject: _Subject) -> None:
    logits = _drawn(18)
    _new(subject).update(logits, [torch.ones(1, view.shape[1]).bool() for view in logits])
    raise AssertionError("`valid` was broadcast")


# Layout


def _laid_out(title: str, *ways: Callable[[Tensor], Tensor]) -> None:
    @_case("layout", title)
    def case(subject: _Subject) -> None:
        for lay in ways:
            odd = [lay(view) for view in _drawn(21)]
            whole = [view.clone(memory_format=torch.contiguous_format) for view in odd]
            one, two = _updated(subject, odd), _updated(subject, whole)
            views = zip(probs_of(one, odd, _TEMP), probs_of(two, whole, _TEMP), strict=True)
            for found, wanted in views:
                same = torch.allclose(found, wanted, rtol=0, atol=1e-6)
                ensure(same, f"{title}: the probs differ")


def _from_map(memory: torch.memory_format) -> Callable[[Tensor], Tensor]:
    return lambda view: view.mT[..., None].contiguous(memory_format=memory).flatten(2).mT


_laid_out("non-contiguous", lambda view: view.transpose(0, -1).contiguous().transpose(0, -1))
_laid_out("expanded", lambda view: view[:1].expand_as(view))
_laid_out(
    "feature maps, channels first and last",
    _from_map(torch.contiguous_format),
    _from_map(torch.channels_last),
)


@_case("layout", "teacher that requires a gradient")
def _live(subject: _Subject) -> None:
    made = _updated(subject, [view.requires_grad_() for view in _drawn(22)])
    logits = [view.requires_grad_() for view in _drawn(23)]
    for probs in probs_of(made, logits, _TEMP):
        ensure(not probs.requires_grad, "the targets hang on the teacher's graph")
    for name, part in made.named_buffers():
        ensure(not part.requires_grad, f"`{name}` hangs on the teacher's graph")


@_case("layout", "inference_mode tensors")
def _inference(subject: _Subject) -> None:
    with torch.inference_mode():
        made = _drawn(24)
        inside = probs_of(_new(subject), made, _TEMP)
    whole = [view.clone() for view in made]
    one, two = _updated(subject, made), _updated(subject, whole)
    _ensure_goes_on(one, two, "after tensors of inference mode")
    for found, wanted in zip(inside, probs_of(_new(subject), whole, _TEMP), strict=True):
        ensure(torch.allclose(found, wanted, rtol=0, atol=1e-6), "in inference mode probs differ")


# State


@_case("state", "a call leaves it alone")
def _pure(subject: _Subject) -> None:
    _needs_state(subject)
    made = _updated(subject, _drawn(1))
    before = state_of(made)
    made(_drawn(2), teacher_temp=_TEMP)
    ensure_same_state(state_of(made), before, "after a call")


@_case("state", "gradient accumulation")
def _accumulated(subject: _Subject) -> None:
    _needs_state(subject)
    parts, whole = _updated(subject, _drawn(1)), _updated(subject, _drawn(1))
    few, more = _drawn(2, images=1), _drawn(3)
    with parts.accumulate():
        parts.update(few)
    parts.update(more)
    whole.update([torch.cat(views) for views in zip(few, more, strict=True)])
    _ensure_goes_on(parts, whole, "an accumulated step", share=1e-5)


@_case("state", "deepcopy")
def _copied(subject: _Subject) -> None:
    made = _updated(subject, _drawn(1))
    before = state_of(made)
    copy.deepcopy(made).update(_drawn(2))
    ensure_same_state(state_of(made), before, "after an update of a deep copy")
    _ensure_goes_on(copy.deepcopy(made), made, "a deep copy")


@_case("state", "state_dict in mid-training, and on")
def _restored(subject: _Subject) -> None:
    for accumulating in (False, True):
        first, second = _updated(subject, _drawn(1)), _new(subject)
        with first.accumulate(accumulating):
            first.update(_drawn(2))
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second.load_state_dict(torch.load(file, weights_only=True))
        _ensure_goes_on(second, first, "from a checkpoint")


@_case("state", "half() and to(bfloat16)")
def _halved(subject: _Subject) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        made = _updated(subject, _drawn(1))
        made.half() if dtype == torch.float16 else made.to(dtype)
        _ensure_goes_on(made, _updated(subject, _drawn(1)), f"after to({dtype})")


# Compile


def _compiled(backend: str) -> None:
    @_case("compile", f"{backend}, ten steps")
    def case(subject: _Subject) -> None:
        graphs = 0

        def counting(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
            nonlocal graphs
            graphs += 1
            compiler = torch._dynamo.lookup_backend(backend)
            made: Callable[..., object] = compiler(module, inputs)
            return made

        def step(targets: Any, logits: Views, temp: float) -> Views:
            probs = probs_of(targets, logits, temp)
            targets.update(logits)
            return probs

        torch.compiler.reset()
        plain, made = _new(subject), _new(subject)
        compiled = torch.compile(
            lambda logits, temp: step(made, logits, temp), fullgraph=True, backend=counting
        )
        for number in range(10):
            logits, temp = _drawn(30 + number), 0.05 + 0.01 * number
            wanted = step(plain, logits, temp)
            for one, two in zip(compiled(logits, temp), wanted, strict=True):
                same = torch.allclose(one, two, rtol=0, atol=1e-5)
                ensure(same, f"compiled, step {number}: the probs differ")
        ensure(graphs <= 2, f"{graphs} graphs over ten steps")


_compiled("aot_eager")
_compiled("inductor")
