"""How a command states its arguments: a row each, of which one parser is made."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

_COMMANDS: list[Any] = []


def parser(description: str | None = None) -> argparse.ArgumentParser:
    """Of every command that was declared."""
    top = argparse.ArgumentParser(prog="fresnel", description=description)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for function, text, rows, more in _COMMANDS:
        name = function.__name__.strip("_")
        made: Any = commands.add_parser(name, help=text, description=text, **more)
        made.set_defaults(command=function)
        group: Any = None
        for flags, kind, about, *metavar in rows:
            named, _, dest = flags.rstrip("!?*|").partition("=")
            options: dict[str, Any] = {"help": about}
            options |= {"metavar": metavar[0]} if metavar else {}
            options |= {"dest": dest} if dest else {}
            options |= {"required": True} if flags[-1] == "!" else {}
            options |= {"nargs": flags[-1]} if flags[-1] in "?*" else {}
            if kind is True:
                options["action"] = "store_true"
            elif isinstance(kind, list):
                options |= {"action": "append", "default": []}
                options |= {"nargs": 2} if isinstance(options["metavar"], tuple) else {}
            elif isinstance(kind, tuple):
                options |= {"choices": kind[1:], "default": kind[0]}
            elif callable(kind):
                options["type"] = kind
            else:
                options |= {"type": type(kind), "default": kind}
            if flags[-1] == "|":
                group = group or made.add_mutually_exclusive_group(required=True)
            (group if flags[-1] == "|" else made).add_argument(*named.split(), **options)
    return top


def command(text: str, *rows: Any, **more: Any) -> Callable:
    """Make a function the command of its name. A row is an argument: flags, kind, help, metavar.

    flags: "=name" the attribute, "!" must be given, "?" may be left out, "*" and more so, "|" one
    of these must be.
    kind: what reads it, [] to repeat it, True for a switch, (default, *choices), else its default.
    """

    def register(function: Callable) -> Callable:
        _COMMANDS.append((function, text, rows, more))
        return function

    return register


def path(text: str) -> Path:
    """A path on the command line: run_all.sh works in the project, and says where its caller is."""
    return Path(os.environ.get("FRESNEL_CALLER", ".")) / text


def seconds(text: str) -> float:
    """Of "90", "90s", "30m" or "2h"."""
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    return float(text[:-1]) * unit if unit else float(text)
