"""What a command says of arguments that it does not know, with the option that was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = ["close_options", "unknown_arguments"]


def close_options(option: str, known: Iterable[str]) -> list[str]:
    """The options that were meant, if any: those of a group by their last name, or the closest.

    Example:
        >>> close_options("--sed=3", ["--seed", "--optim.lr"])
        ['--seed']
        >>> close_options("--lr", ["--seed", "--optim.lr", "--optim.lr_end"])
        ['--optim.lr']
        >>> close_options("--frobnicate", ["--seed"])
        []
    """
    name, options = option.partition("=")[0].lstrip("-"), list(known)
    grouped = [other for other in options if other.rpartition(".")[2] == name]
    return grouped or difflib.get_close_matches(f"--{name}", options, n=1)


def unknown_arguments(
    command: str,
    unknown: Sequence[str],
    options: Sequence[str],
    *,
    places: Sequence[str] = (),
    bare: str | None = None,
) -> str:
    """A line on the arguments that are left when a command line has been read.

    Args:
        command: as it is typed, such as ``"local-distill show"``.
        unknown: what is left, in order.
        options: those that the command has, with their dashes.
        places: names of the arguments that it takes without dashes, in order.
        bare: the option that was meant where a value stands alone.

    Returns:
        What is wrong, what was meant, and where the help is.

    Example:
        >>> unknown_arguments("prog bench", ["--quik"], ["--quick", "--json"])
        'there is no option --quik, did you mean --quick? (see prog bench --help)'
        >>> unknown_arguments("prog eval", ["/run"], ["--checkpoint"], bare="--checkpoint")
        "'/run' stands alone, did you mean --checkpoint /run? (see prog eval --help)"
    """
    value = unknown[0]
    if not _is_option(value):
        hint = f"stands alone, did you mean {bare} {value}?" if bare else "is one argument too many"
        return f"{value!r} {hint} (see {command} --help)"
    names = [argument.partition("=")[0] for argument in unknown if _is_option(argument)]
    told = []
    if any(name.lstrip("-") in places for name in names):
        usage = " ".join([command, *map(str.upper, places)])
        told = [f"{', '.join(places)}: given without a name, as in `{usage}`"]
    for name in names:
        if name.lstrip("-") not in places:
            close = close_options(name, options)
            hint = f", did you mean {' or '.join(close)}?" if close else ""
            told.append(f"there is no option {name}{hint}")
    return f"{'; '.join(told)} (see {command} --help)"


def _is_option(argument: str) -> bool:
    return argument.startswith("-") and not argument.lstrip("-")[:1].isdigit()
