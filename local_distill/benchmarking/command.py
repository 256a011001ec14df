"""The command ``local-distill bench``; in the repository also ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from local_distill import __version__
from local_distill.benchmarking.by_path import matcher_by_path
from local_distill.benchmarking.cases import Case, Settings
from local_distill.benchmarking.comparing import compare_reports, comparison_table
from local_distill.benchmarking.losses import loss_cases
from local_distill.benchmarking.machine import describe_machine, measure_rates
from local_distill.benchmarking.matchers import matcher_cases
from local_distill.benchmarking.option_typos import unknown_arguments
from local_distill.benchmarking.others import MEASURED_LIBRARIES, library_versions
from local_distill.benchmarking.plotting import check_plot_path, plot_report
from local_distill.benchmarking.progress import progress_bar
from local_distill.benchmarking.report import (
    Report,
    describe_settings,
    now,
    read_report,
    write_report,
)
from local_distill.benchmarking.rows import OUT_OF_MEMORY, Row, measure_case
from local_distill.benchmarking.sizes import SIZES, check_sizes
from local_distill.benchmarking.table import case_table, headline
from local_distill.benchmarking.training_steps import training_step_cases
from local_distill.benchmarking.transforms import transform_cases
from local_distill.errors import ConfigError, LocalDistillError

__all__ = ["SUITES", "Suite", "main"]


class Suite(NamedTuple):
    """What a suite measures, in a line, the function that makes its cases, and its own options."""

    summary: str
    cases: Callable[[Settings], Iterable[Case]]
    options: tuple[str, ...] = ()


SUITES = {
    "matchers": Suite(
        "the matches of a step's 18 pairs of views, your matcher too",
        matcher_cases,
        ("sizes", "device", "dtype", "matcher"),
    ),
    "losses": Suite(
        "losses, forward and backward", loss_cases, ("sizes", "device", "dtype", "prototypes")
    ),
    "step": Suite(
        "whole training steps: what the local loss adds",
        training_step_cases,
        ("sizes", "device", "dtype", "prototypes"),
    ),
    "transforms": Suite("DINO's augmentation with and without geometry", transform_cases),
}
_DTYPES = ("float32", "bfloat16", "float16", "float64")
# What is measured, and what --quick takes instead.
_DEFAULTS = {"batch": 8, "prototypes": 65_536, "repeats": 9, "least_seconds": 0.1}
_QUICK = {"batch": 2, "prototypes": 512, "repeats": 3, "least_seconds": 0.005}


class _Parser(argparse.ArgumentParser):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.allow_abbrev = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """A suite's own parser says what it does not know; argparse leaves that to the outer."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            options = [name for action in self._actions for name in action.option_strings]
            print(f"error: {unknown_arguments(self.prog, unknown, options)}", file=sys.stderr)
            raise SystemExit(2)
        return known, unknown

    def error(self, message: str) -> NoReturn:
        """One line, without the usage before it."""
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def main(arguments: Sequence[str] | None = None, *, prog: str = "local-distill bench") -> int:
    """Measure a suite, or compare two reports.

    Returns:
        0; 1 after a regression, or where a way failed; 2 for what the user can mend; 130 after
        Ctrl-C.
    """
    settings = _parser(prog).parse_args(arguments)
    try:
        if settings.command == "compare":
            return _compare(settings)
        return _measure(settings)
    except LocalDistillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog,
        description="Time and memory of matchers, losses and transforms on this machine, beside "
        "plain references and other libraries.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="SUITE")
    for name, suite in SUITES.items():
        own = commands.add_parser(name, help=suite.summary, description=suite.summary)
        _add_options(own, suite.options)
    compare = commands.add_parser("compare", help="two reports, by their ratios to the reference")
    compare.add_argument("before", type=Path, help="JSON of the older run")
    compare.add_argument("after", type=Path, help="JSON of the newer run")
    compare.add_argument(
        "--tolerance", type=float, default=1.25, help="how many times as large a ratio may be"
    )
    return parser


def _add_options(parser: argparse.ArgumentParser, own: Sequence[str]) -> None:
    parser.set_defaults(sizes=None, prototypes=None, device="cpu", dtype="float32", matcher=[])
    add = parser.add_argument
    add("--batch", type=int, help=f"images (default {_DEFAULTS['batch']})")
    if "sizes" in own:
        add("--sizes", nargs="+", metavar="SIZE", help=f"out of {', '.join(SIZES)}")
    if "prototypes" in own:
        add("--prototypes", type=int, help=f"how many (default {_DEFAULTS['prototypes']})")
    if "device" in own:
        add("--device", help="as torch names it: cpu, cuda, cuda:1")
    if "dtype" in own:
        add("--dtype", choices=_DTYPES, help="of features, logits, prototypes (default float32)")
    if "matcher" in own:
        add(
            "--matcher",
            action="append",
            metavar="PATH",
            help="your own by import path, such as my_package.MyMatcher; may be repeated",
        )
    add("--threads", type=int, help="torch's, on the CPU (default: as torch has them)")
    add("--repeats", type=int, help=f"how often the ways take turns ({_DEFAULTS['repeats']})")
    add("--json", type=Path, help="where to write the report")
    add("--plot", type=Path, help="where to draw it (.png, .svg, .pdf); needs matplotlib")
    add("--quick", action="store_true", help="small inputs, few repeats: seconds, no measurement")


def _compare(settings: argparse.Namespace) -> int:
    found = compare_reports(
        read_report(settings.before), read_report(settings.after), tolerance=settings.tolerance
    )
    print(comparison_table(found, settings.tolerance))
    return 1 if found.regressions else 0


def _measure(options: argparse.Namespace) -> int:
    defaults = _QUICK if options.quick else _DEFAULTS
    settings = Settings(
        sizes=None if options.sizes is None else check_sizes(options.sizes),
        batch=_at_least_one("--batch", options.batch, defaults["batch"]),
        prototypes=_at_least_one("--prototypes", options.prototypes, defaults["prototypes"]),
        device=_device(options.device),
        dtype=getattr(torch, options.dtype),
        matchers={path: matcher_by_path(path) for path in options.matcher},
        quick=options.quick,
    )
    repeats = _at_least_one("--repeats", options.repeats, defaults["repeats"])
    for path in (options.json, options.plot):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"no folder {path.parent}: make it before measuring into it")
    if options.plot is not None:
        check_plot_path(options.plot)
    threads = torch.get_num_threads()
    torch.set_num_threads(_at_least_one("--threads", options.threads, threads))
    try:
        report = _run(options.command, settings, repeats, defaults["least_seconds"])
    finally:
        torch.set_num_threads(threads)
    if options.json is not None:
        write_report(report, options.json)
        print(f"wrote {options.json}")
    if options.plot is not None:
        plot_report(report, options.plot)
        print(f"drew {options.plot}")
    failed = [row.way for row in report.rows if row.failed not in (None, OUT_OF_MEMORY)]
    if failed:
        print(f"error: could not be measured: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _run(suite: str, settings: Settings, repeats: int, least_seconds: float) -> Report:
    created, machine = now(), describe_machine(settings.device)
    rates = measure_rates(settings.device, settings.dtype, quick=settings.quick)
    print(headline(machine, rates), flush=True)
    rows: list[Row] = []
    for case in SUITES[suite].cases(settings):
        with progress_bar(case.name, repeats * len(case.ways)) as advance:
            found = measure_case(
                case,
                rates,
                settings.device,
                repeats=repeats,
                least_seconds=least_seconds,
                after_turn=advance,
            )
        rows += found
        del case  # its tensors, before the next case makes its own
        print(f"\n{case_table(found)}", flush=True)
    libraries = library_versions()
    absent = [name for name in MEASURED_LIBRARIES if libraries[name] is None]
    if absent:
        print(f"\nnot installed: {', '.join(absent)}; their ways, if any, are not in the tables")
    return Report(
        suite,
        created,
        __version__,
        describe_settings(settings, repeats, least_seconds),
        machine,
        rates,
        libraries,
        rows,
    )


def _at_least_one(name: str, given: int | None, default: float) -> int:
    value = int(default) if given is None else given
    if value < 1:
        raise ConfigError(f"{name} must be at least 1, got {value}")
    return value


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name!r} is no device; use cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: measured are cpu and cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


if __name__ == "__main__":
    sys.exit(main())
