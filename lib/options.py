"""A program's options: the fields of a dataclass, from JSON and command line, --help from its comments."""

import dataclasses
import difflib
import inspect
import json
import math
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

if {"-h", "--help"} & set(sys.argv):  # a pipe that closes, as of `--help | head`, ends it without a traceback
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)

DEVICES, DTYPES = ("auto", "cpu", "cuda"), ("auto", "float32", "bfloat16")


class UserError(Exception):
    """What ends a command with one line on the screen and exit code 2: the message names a value, where it
    stands and what to do."""


def command(main: Callable[[], None]) -> Callable[[], None]:
    """A decorator for a command's `main`: a UserError or OSError ends the process with one line and exit
    code 2, Ctrl-C with 130. A rank of several ends there and then after any error: whatever waits for the
    others, who may be in a collective, would never return."""
    def run():
        rank, alone = int(os.environ.get("RANK", 0)), os.environ.get("WORLD_SIZE", "1") == "1"
        try:
            return main()
        except KeyboardInterrupt:
            print("stopped: the same command goes on from what is written", file=sys.stderr)
            code = 130
        except (UserError, OSError) as e:
            if rank and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
                time.sleep(5)  # rank 0 says the same at once, and torchrun ends all with the first that exits
            print(f"error{f' on rank {rank}' * bool(rank)}: {e}", file=sys.stderr, flush=True)
            code = 2
        except Exception:
            if alone:
                raise
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        (sys.exit if alone else os._exit)(code)
    return run


def help_text(kind: type, about: str) -> str:
    """--help, made from the comments beside the fields of the dataclass `kind`."""
    lines = re.findall(r"^    (\w+): (\w+) = .+?  # (.+)$", inspect.getsource(kind), re.M)
    rows = [f"  --{name:22}{type:7}{comment} [{getattr(kind, name)!r}]" for name, type, comment in lines]
    return "\n".join([about.strip(), "", "Options, with their defaults:", *rows])


def convert(config: type, name: str, value, source: str, others: tuple[str, ...] = ()):
    """A string or JSON value as the type of the field `name`; raises UserError."""
    fields = {f.name: f for f in dataclasses.fields(config)}
    if name not in fields:
        near = difflib.get_close_matches(name, [*fields, *others], 1)
        raise UserError(f"{source}: there is no option {name!r}" +
                        (f"; did you mean {near[0]!r}?" if near else "; see --help"))
    kind = fields[name].type
    try:
        if kind is bool and not isinstance(value, bool):
            return {"true": True, "false": False}[str(value).lower()]
        if isinstance(value, str) and kind is not str:
            return kind(value)
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise ValueError
        return value
    except (KeyError, ValueError, OverflowError):
        expected = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}[kind]
        raise UserError(f"{source}: {name} must be {expected}, not {value!r}") from None


def parse(config: type, arguments: list[str], about: str):
    """A `config` with the values that are given, see `read`."""
    return config(**read(config, arguments, about)[0])


def read(config: type, arguments: list[str], about: str,
         others: tuple[str, ...] = ()) -> tuple[dict, list[str]]:
    """The values from `--config FILE.json` and `--NAME VALUE` (or --NAME=VALUE), by name, later ones win; and
    the files.

    about: what --help says above the options. others: of another class, to suggest. Raises UserError.
    """
    values, files, rest = {}, [], []
    for argument in arguments:
        rest += argument.split("=", 1) if argument.startswith("--") and "=" in argument else [argument]
    while rest:
        name = rest.pop(0)
        if name in ("-h", "--help"):
            print(help_text(config, about))
            raise SystemExit(0)
        if not name.startswith("--"):
            raise UserError(f"command line: {name!r} is no option; options are written --NAME VALUE")
        if not rest:
            raise UserError(f"command line: {name} lacks its value")
        name, value = name[2:].replace("-", "_"), rest.pop(0)
        if name == "config":
            files.append(value)
            try:
                loaded = json.loads(Path(value).read_text())
            except (OSError, ValueError) as e:
                raise UserError(f"{value} cannot be read ({e}): give a JSON object of options") from None
            if not isinstance(loaded, dict):
                raise UserError(f"{value} is not a JSON object of options")
            loaded = {k: v for k, v in loaded.items() if not k.startswith("//")}  # a comment
            values |= {k: convert(config, k, v, value) for k, v in loaded.items()}
        else:
            values[name] = convert(config, name, value, "command line", others)
    return values, files


def check_numbers(config, positive: str = "", not_negative: str = ""):
    """Whether the named fields, separated by spaces, are above 0, or finite and not below it. Raises
    UserError."""
    for name in positive.split():
        if not getattr(config, name) > 0:
            raise UserError(f"{name} must be positive, not {getattr(config, name)}")
    for name in not_negative.split():
        if not 0 <= getattr(config, name) < math.inf:
            raise UserError(f"{name} must not be negative or infinite, is {getattr(config, name)}")


def check_choices(config, **choices: tuple[str, ...]):
    """Whether each named field has one of its values. Raises UserError."""
    for name, values in choices.items():
        if getattr(config, name) not in values:
            raise UserError(f"{name} must be one of {', '.join(values)}, not {getattr(config, name)!r}")
