"""The parser of the command line; what it cannot take is answered without a screen of usage."""

from __future__ import annotations

import re
import sys
from difflib import get_close_matches
from inspect import signature
from typing import Any, NoReturn

import jsonargparse

from local_distill.benchmarking.by_path import find_by_path
from local_distill.benchmarking.option_typos import unknown_arguments

__all__ = ["CommandParser"]

_REQUIRED = "the following arguments are required: "
_UNKNOWN = "unrecognized arguments: "
# In the words of several versions of jsonargparse.
_NO_METHOD = re.compile(
    r"Method is abstract|Not a valid subclass of Method|class_path '[\w.]+\.Method'"
)
_EXAMPLES = {"--method.matcher": "--method.matcher local_distill.SimilarityMatcher"}
_MORE = {"--method.matcher": "; a matcher is named by its import path"}
_NOT_ACCEPTED = re.compile(
    r"^Parser key \"([\w.]+)\".*class_path '([\w.]+)':\s+Option '(\w+)' is not accepted", re.DOTALL
)
_NO_COMMAND = re.compile(
    r"^argument subcommand: invalid choice: '([^']*)'|^expected \"subcommand\""
)
# Of jsonargparse's own making: nobody typed it.
_INTERNAL = re.compile(r"\n *Given value(?: type)?: [^\n]*NestedArg[^\n]*")


class CommandParser(jsonargparse.ArgumentParser):
    """A parser of one command, or of all; no option can be abbreviated.

    Attributes:
        commands: the parser of each command.
        bare: the option that was meant where a value stands alone.
    """

    def __init__(self, *args: Any, bare: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})
        self.commands: dict[str, CommandParser] = {}
        self.bare = bare

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong and how it is typed, and leave with status 2."""
        if not self.exit_on_error:  # a class within an option: the outer parser says it
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        told = parser.in_our_words(message) if isinstance(parser, CommandParser) else message
        print(f"error: {told}", file=sys.stderr)
        raise SystemExit(2)

    def in_our_words(self, message: str) -> str:
        """The message as a person who typed the command understands it."""
        if message.startswith(_REQUIRED):
            return self._missing(message.removeprefix(_REQUIRED).split(", "))
        if message.startswith(_UNKNOWN):
            return unknown_arguments(
                self._typed,
                message.removeprefix(_UNKNOWN).split(),
                [name for action in self._actions for name in action.option_strings],
                places=self._places,
                bare=self.bare,
            )
        unnamed = self._setting_of_no_method()
        if unnamed and _NO_METHOD.search(message):
            setting = _EXAMPLES.get(unnamed, f"{unnamed} ...")
            return (
                f"`{unnamed}` is a setting of a method, but none is named before it: --method NAME "
                f"must come first, as in `{self._typed} --method Glsd {setting}`"
                f"{_MORE.get(unnamed, '')} (see {self._typed} --help)"
            )
        refused = _NOT_ACCEPTED.search(message)
        if refused:
            group, owner, name = refused.groups()
            settings = [f"--{group}.{known}" for known in signature(find_by_path(owner)).parameters]
            return unknown_arguments(self._typed, [f"--{group}.{name}"], settings)
        if self.commands and (unknown := _NO_COMMAND.search(message)):
            close = get_close_matches(unknown[1] or "", self.commands, n=1)
            what = f"there is no command {unknown[1]!r}" if unknown[1] else "name a command"
            hint = f", did you mean {close[0]}?" if close else ";"
            there = ", ".join(self.commands)
            return f"{what}{hint} there are {there} (see {self._typed} --help)"
        message = _INTERNAL.sub("", message)
        separator = "\n" if "\n" in message else " "
        return f"{message}{separator}(see {self._typed} --help)"

    def _setting_of_no_method(self) -> str | None:
        """The first of ``--method.…`` where no ``--method`` stands before it."""
        names = [argument.partition("=")[0] for argument in getattr(self, "args", [])]
        first = next((name for name in names if f"{name}.".startswith("--method.")), "--method")
        return None if first == "--method" else first

    @property
    def _typed(self) -> str:
        return self.prog.replace(" [options]", "")

    @property
    def _places(self) -> list[str]:
        return [action.dest for action in self._actions if not action.option_strings]

    def _missing(self, keys: list[str]) -> str:
        name, _, _ = keys[0].partition(".")
        command = self.commands.get(name, self)
        missing = " and ".join(key.removeprefix(f"{name}.").upper() for key in keys)
        usage = " ".join([command._typed, *map(str.upper, command._places)])
        return f"`{name}` needs {missing}: {usage} (see {command._typed} --help)"
