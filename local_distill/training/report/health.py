"""Whether a run is well: what someone who knows would look at first, said in sentences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from local_distill.training.report.read_run import RunRecord, is_number

__all__ = ["Finding", "entropy_limit", "find", "values_of"]

# Below this share of ln c an entropy means one prototype, above the other all of them alike.
_LEAST_SHARE, _UNIFORM = 0.02, 0.99
_LEAST_SPREAD = 0.05
# What counts as "at the end": the last tenth of the logged lines, at least three of them.
_LAST_SHARE, _LEAST_LINES = 0.1, 3


class Finding(NamedTuple):
    """One sentence on a run's health.

    Attributes:
        level: "good", "note" (look at it) or "bad" (something is wrong).
        title: a few words.
        text: what was seen, and what to do.
    """

    level: Literal["good", "note", "bad"]
    title: str
    text: str


def find(run: RunRecord) -> list[Finding]:
    """Findings, the worst first.

    Example:
        >>> from pathlib import Path
        >>> lines = [{"step": i, "loss": 5.0, "teacher_entropy": 0.0} for i in range(9)]
        >>> run = RunRecord(Path("x"), lines, None, {}, {}, None, {}, [])
        >>> find(run)[0].title
        'Collapse: teacher_entropy is near 0'
    """
    checks = (_finite, _skipped, _entropy, _spread, _coverage, _gradient, _learning, _data, _files)
    found = [finding for check in checks for finding in check(run)]
    return sorted(found, key=lambda one: ("bad", "note", "good").index(one.level))


def values_of(metrics: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of the lines that have a number of that name, NaN and infinity as well."""
    return [(line["step"], float(line[name])) for line in metrics if is_number(line.get(name))]


def entropy_limit(run: RunRecord) -> float | None:
    """The ln c of the teacher's prototypes, from its monitors or else the settings; None: unknown.

    Example:
        >>> from pathlib import Path
        >>> lines = [{"step": 1, "teacher_entropy": 1.0, "teacher_kl": 1.5}]
        >>> entropy_limit(RunRecord(Path("x"), lines, None, {}, {}, None, {}, []))
        2.5
    """
    for line in reversed(run.metrics):
        parts = (line.get("teacher_entropy"), line.get("teacher_kl"))  # KL to the uniform one
        if is_number(parts[0]) and is_number(parts[1]) and math.isfinite(sum(parts)):
            return float(sum(parts))
    sizes = set(_prototypes(run.config))
    return math.log(sizes.pop()) if len(sizes) == 1 and min(sizes) > 1 else None


def _late(run: RunRecord, name: str) -> float | None:
    """Median of a metric's finite values at the end, or None where there are none."""
    values = [value for _, value in values_of(run.metrics, name)]
    count = max(_LEAST_LINES, round(len(values) * _LAST_SHARE))
    finite = [value for value in values[-count:] if math.isfinite(value)]
    return statistics.median(finite) if finite else None


def _finite(run: RunRecord) -> Iterator[Finding]:
    # a norm may overflow under fp16, and that step is skipped: that is its own finding
    names = [name for name in _names(run) if name != "gradient_norm"]
    bad = {
        name: [step for step, value in values_of(run.metrics, name) if not math.isfinite(value)]
        for name in names
    }
    bad = {name: steps for name, steps in bad.items() if steps}
    for name, steps in bad.items():
        yield Finding(
            "bad",
            f"{name} is not finite",
            f"NaN or infinity in {len(steps)} logged lines, first at step {steps[0]}, last at step "
            f"{steps[-1]}. Lower the learning rate, clip the gradient, or use bf16 in place of "
            "fp16; go on from a checkpoint before that step.",
        )
    if not bad:
        yield Finding("good", "All numbers are finite", "No NaN and no infinity in the log.")


def _skipped(run: RunRecord) -> Iterator[Finding]:
    by_name = {name: values_of(run.metrics, name) for name in _names(run) if "skipped" in name}
    for name, values in by_name.items():
        most = int(max((value for _, value in values if math.isfinite(value)), default=0))
        if most:
            yield Finding(
                "note",
                f"Steps were skipped ({name})",
                f"Up to {most} steps had no finite gradient and were left out. A few at the start "
                "of fp16 are the scaler's search; more of them point at the learning rate or the "
                "data.",
            )
    norms = values_of(run.metrics, "gradient_norm")
    if steps := [step for step, value in norms if not math.isfinite(value)]:
        yield Finding(
            "note",
            "The gradient was not finite",
            f"In {len(steps)} logged steps, first at step {steps[0]}; such steps are skipped.",
        )


def _entropy(run: RunRecord) -> Iterator[Finding]:
    most = entropy_limit(run)
    for name in _names(run):
        prefix = name.removesuffix("teacher_entropy")
        late = _late(run, name)
        if prefix == name or late is None:
            continue
        marginal, told = (_late(run, prefix + part) for part in ("marginal_entropy", "information"))
        least = _LEAST_SHARE * (most or 5.0)
        if most is not None and late > _UNIFORM * most:
            yield Finding(
                "bad",
                f"Collapse: {name} is near ln c",
                f"It ends at {late:.4g} of at most {most:.4g} nats: the teacher gives all "
                "prototypes alike and says nothing of the image. Its temperature is too high, or "
                "training has not yet begun to work.",
            )
        elif (marginal if marginal is not None else late) < least:
            shown = name if marginal is None else f"{prefix}marginal_entropy"
            yield Finding(
                "bad",
                f"Collapse: {shown} is near 0",
                f"It ends at {late if marginal is None else marginal:.3g} nats: the teacher gives "
                "one prototype to all images. Centering is too slow or missing, or the teacher's "
                "temperature too low.",
            )
        elif told is not None and told < least:
            yield Finding(
                "bad",
                f"Collapse: {prefix}information is near 0",
                f"It ends at {told:.3g} nats: the teacher says the same of every image.",
            )
        else:
            limit = "" if most is None else f" of at most {most:.4g} (ln c)"
            yield Finding(
                "good", f"No collapse in {name}", f"The teacher ends at {late:.4g} nats{limit}."
            )


def _spread(run: RunRecord) -> Iterator[Finding]:
    for name in _names(run):
        late = _late(run, name) if name.endswith("feature_std") else None
        if late is not None and late < _LEAST_SPREAD:
            yield Finding(
                "bad",
                f"Collapse: {name} is near 0",
                f"It ends at {late:.3g}; it is about 1 where features spread over the sphere, and "
                "0 where all are the same.",
            )


def _coverage(run: RunRecord) -> Iterator[Finding]:
    for name in _names(run):
        if not name.endswith("coverage"):
            continue
        late = _late(run, name)
        if late == 0:
            yield Finding(
                "bad",
                f"{name} is 0: no token finds a match",
                "The local loss learns nothing. Views may not overlap, max_distance may be too "
                "small, or the features are NaN or of zero norm.",
            )
        elif late is not None and late < 0.05:
            yield Finding(
                "note", f"{name} is small", f"Only {late:.1%} of the student's tokens are matched."
            )
        elif late is not None:
            yield Finding(
                "good", "Tokens find matches", f"{late:.0%} of the student's tokens ({name})."
            )


def _gradient(run: RunRecord) -> Iterator[Finding]:
    late = _late(run, "gradient_norm")
    if late == 0:
        yield Finding("bad", "The gradient is 0", "Nothing is learned any more.")


def _learning(run: RunRecord) -> Iterator[Finding]:
    values = [v for _, v in values_of(run.metrics, "loss") if math.isfinite(v)]
    if len(values) < 2 * _LEAST_LINES:
        yield Finding(
            "note", "A short log", f"{len(values)} lines hold a loss: too few to judge by."
        )
        return
    count = max(_LEAST_LINES, round(len(values) * _LAST_SHARE))
    first, last = statistics.median(values[:count]), statistics.median(values[-count:])
    if last < first:
        yield Finding("good", "The loss fell", f"From {first:.4g} to {last:.4g} (medians).")
    else:
        yield Finding(
            "note",
            "The loss did not fall",
            f"{first:.4g} at the start, {last:.4g} at the end (medians). That alone is no fault: "
            "the targets sharpen as the teacher's temperature and the center move. Look at the "
            "entropy and at an evaluation.",
        )


def _data(run: RunRecord) -> Iterator[Finding]:
    if run.bad_images:
        count = len(run.bad_images)
        yield Finding(
            "note", "Images were bad", f"{count} reported, and replaced by others: see below."
        )


def _files(run: RunRecord) -> Iterator[Finding]:
    for problem in run.problems:
        yield Finding("note", "A file of the run cannot be read", problem)
    if not run.checkpoints:
        yield Finding("note", "No checkpoint", "There is nothing to resume from, or to evaluate.")


def _names(run: RunRecord) -> list[str]:
    """Metrics that hold numbers, in the order in which they first appear."""
    return list(
        dict.fromkeys(
            name
            for line in run.metrics
            for name, value in line.items()
            if name not in ("step", "epoch") and is_number(value)
        )
    )


def _prototypes(config: Any) -> Iterator[int]:
    """Every number of prototypes among the settings, wherever a method keeps it."""
    if isinstance(config, dict):
        for name, value in config.items():
            if str(name).endswith("num_prototypes") and isinstance(value, int):
                yield value
            else:
                yield from _prototypes(value)
