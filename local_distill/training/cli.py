"""The command line: ``local-distill train | eval | report | export | show | demo | bench``."""

from __future__ import annotations

import difflib
import json
import logging
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from local_distill import __version__
from local_distill.benchmarking.command import main as bench
from local_distill.errors import ConfigError, LocalDistillError, require_extra

__all__ = ["build_parser", "main"]

# What a value means that stands alone, in commands that take none.
_BARE = {"train": "--data", "eval": "--checkpoint", "demo": "--output"}


def build_parser() -> tuple[Any, dict[str, Callable[..., Any]]]:
    """The parser, and the function behind each command."""
    jsonargparse = require_extra("jsonargparse", "train")
    for module in ("timm", "torchvision", "lightning_fabric", "matplotlib", "sklearn", "tqdm"):
        require_extra(module, "train")
    from local_distill.training import commands
    from local_distill.training.command_parser import CommandParser
    from local_distill.training.demo import demo
    from local_distill.training.evaluation.evaluate import evaluate
    from local_distill.training.export import export_backbone
    from local_distill.training.report.report import report
    from local_distill.training.views import DemoCrop

    functions: dict[str, Callable[..., Any]] = {
        "train": commands.train,
        "eval": evaluate,
        "export": export_backbone,
        "report": report,
        "show": commands.show,
        "demo": demo,
    }
    parser = CommandParser(
        prog="local-distill",
        description="Local self-distillation: train, evaluate, look and measure.",
        version=__version__,
    )
    subcommands = parser.add_subcommands()
    for name, function in functions.items():
        summary = (function.__doc__ or "").partition("\n")[0]
        sub = CommandParser(description=summary, bare=_BARE.get(name))
        sub.add_argument("--config", action="config", help="a YAML file with these settings")
        sub.add_function_arguments(
            function,
            as_positional=name in ("export", "report", "show"),
            skip={"config"},
            sub_configs=False,
        )
        defaults: dict[str, Any] = {}
        if name in ("train", "show"):
            defaults["views"] = jsonargparse.lazy_instance(DemoCrop)
        sub.set_defaults(defaults)
        subcommands.add_subcommand(name, sub, help=summary)
        parser.commands[name] = sub
    # For --help and typos alone: `main` hands it on before it comes here.
    summary = "Time and memory of the parts, and of a matcher of yours, beside others'."
    parser.commands["bench"] = CommandParser()
    subcommands.add_subcommand("bench", parser.commands["bench"], help=summary)
    return parser, functions


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, 2 for what the user can mend, 130 after Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["bench"]:  # apart, as it needs no extra
        return bench(given[1:])
    here = str(Path.cwd())
    if here not in sys.path:  # `python -m` has it: so that a class of one's own is found there
        sys.path.append(here)
    try:
        parser, functions = build_parser()
        _check_method_name(given)
        _check_matcher_name(given)
        settings = parser.parse_args(arguments)
        name = settings.subcommand
        record = json.loads(parser.dump(settings, format="json"))[name]
        record.pop("config", None)
        values = _instantiate(parser, settings)[name].as_dict()
        values.pop("config", None)
        if name == "train":
            values["config"] = record
        result = functions[name](**values)
    except LocalDistillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"interrupted{f': {error}' if str(error) else ''}", file=sys.stderr)
        return 130
    return 130 if getattr(result, "interrupted", False) else 0


def _check_method_name(arguments: Sequence[str]) -> None:
    """A name of no method is answered with the names that there are; jsonargparse knows none."""
    from local_distill.training import methods

    known = [name for name in methods.__all__ if name not in ("Method", "Models", "StepTerms")]
    for name in _bare_names("--method", arguments):
        if name not in known:
            close = difflib.get_close_matches(name.capitalize(), known, n=1)
            hint = f", did you mean {close[0]}?" if close else "."
            raise ConfigError(
                f"`--method`: there is no {name!r}{hint} There are {', '.join(known)}; a class of "
                "your own is named by its import path"
            )


def _check_matcher_name(arguments: Sequence[str]) -> None:
    """A bare name of a matcher is answered with its import path, and with those that there are."""
    from local_distill import matching

    if not any(argument.partition("=")[0] in ("--method", "--config") for argument in arguments):
        return  # the parser says that a method has to be named first
    known = [name for name in matching.__all__ if name.endswith("Matcher")]
    for name in _bare_names("--method.matcher", arguments):
        lower = {other.removesuffix("Matcher").lower(): other for other in known}
        close = difflib.get_close_matches(name.removesuffix("Matcher").lower(), lower, n=1)
        hint = f", did you mean local_distill.{lower[close[0]]}?" if close else "."
        raise ConfigError(
            f"`--method.matcher`: {name!r} is no import path{hint} In local_distill there are "
            f"{', '.join(known)}; one of your own is named by its import path too, as "
            "my_package.MyMatcher"
        )


def _bare_names(option: str, arguments: Sequence[str]) -> list[str]:
    """The option's values that are no import path, no settings in braces, and not null."""
    pairs = [argument.partition("=") for argument in arguments if argument.startswith(f"{option}=")]
    given = [value for _, _, value in pairs]
    given += [after for flag, after in pairwise(arguments) if flag == option]
    return [
        name
        for name in given
        if "." not in name and name != "null" and not name.startswith(("-", "{"))
    ]


def _instantiate(parser: Any, settings: Any) -> Any:
    """Build the classes; what one of ours refuses is said in its own words."""
    try:
        return parser.instantiate(settings)
    except ValueError as error:
        cause: BaseException | None = error
        while cause is not None:  # a class within a class has its error within an error
            if isinstance(cause, LocalDistillError):
                raise cause from None
            cause = cause.__cause__
        raise


if __name__ == "__main__":
    sys.exit(main())
