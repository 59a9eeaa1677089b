"""Command-line options from the fields of a dataclass, errors for users, and JSON whose fields are checked by
type and range."""

import dataclasses
import difflib
import inspect
import json
import os
import re
import signal
import sys
import textwrap
import time
import traceback
from collections import namedtuple
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

if {"-h", "--help"} & set(sys.argv):  # a pipe that closes, as of `--help | head`, ends it without a traceback
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)

DEVICES, DTYPES = ("auto", "cpu", "cuda"), ("auto", "float32", "bfloat16")
LARGEST = 10**9  # upper bound of options such as sizes and seconds
LIMIT = 10**18  # upper bound of any number, such as a seed
FILE_BYTES = 2**26  # largest JSON file
EXPECTED = {bool: "true or false", int: "a whole number of at most 18 digits", float: "a number up to 1e18",
            str: "a string", list: "a list", tuple: "a string", dict: "an object"}
BOOLS = {"true": True, "false": False}
TORCHRUN = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE TORCHELASTIC_RESTART_COUNT MASTER_PORT".split()
# Type and range of a value; `default` replaces a missing or null value, which is an error without a default.
Field = namedtuple("Field", "kind least most default", defaults=(-LIMIT, LIMIT, ...))


class UserError(Exception):
    """An error that the user can repair. It ends a command with one line and exit code 2; the message names
    the value, its place and the remedy."""


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Decorator for a command's `main`: a UserError or OSError ends the process with one line and exit code
    2, Ctrl-C with 130. With several ranks any error ends the process immediately, without cleanup, which
    would wait for ranks that may be in a collective."""
    def run():
        rank, alone = 0, True
        try:
            rank, alone = environment()["RANK"], environment()["WORLD_SIZE"] <= 1
            return main()
        except KeyboardInterrupt:
            print("stopped: the same command continues from what is written", file=sys.stderr)
            code = 130
        except (UserError, OSError) as e:
            if rank and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
                time.sleep(5)  # rank 0 prints the same error, and torchrun then ends the other ranks
            message = str(e).replace("\n", "\\n")[:3000]
            print(f"error{f' on rank {rank}' * bool(rank)}: {message}", file=sys.stderr, flush=True)
            code = 2
        except Exception:
            if alone:
                raise
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        (sys.exit if alone else os._exit)(code)
    return run


def environment() -> dict[str, int]:
    """The numbers that torchrun sets, 0 where one is not set. Raises UserError."""
    numbers = {k: int(v) if re.fullmatch("[0-9]{1,18}", v) else v for k, v in os.environ.items()}
    return typed(numbers, "environment", {name: Field(int, 0, 65535, 0) for name in TORCHRUN})


def shown(value) -> str:
    """The value for a message, shortened to about 100 characters."""
    return text if len(text := repr(value)) <= 100 else f"{text[:80]}... ({len(text):,} characters)"


def finite(text: str) -> float:
    if abs(number := float(text)) < float("inf"):
        return number
    raise ValueError(f"{text[:80]} is not a finite number")


DECODER = json.JSONDecoder(parse_float=finite, parse_constant=finite)


def parse_json(data: bytes) -> dict:
    """The JSON object in UTF-8 data. Raises ValueError."""
    try:
        value = DECODER.decode(data.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it must be a JSON object")
    return value


def read_json(path: str | Path, remedy: str, /, **fields: Field) -> dict:
    """The object in a JSON file, its fields checked. Raises UserError, which ends with the remedy."""
    try:
        with open(path, "rb") as f:
            if len(data := f.read(FILE_BYTES + 1)) > FILE_BYTES:
                raise ValueError(f"more than {FILE_BYTES:,} bytes")
        value = parse_json(data)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {remedy}") from None
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({getattr(e, 'strerror', None) or e}): {remedy}") from None
    return value | typed(value, path, fields)


def typed(raw: dict, source: str | Path, fields: dict[str, Field]) -> dict:
    """The named values of an object, checked by type and range. Raises UserError, which names the source."""
    values = {}
    for name, field in fields.items():
        value, kind, number = raw.get(name), field.kind, field.kind in (int, float)
        if value is None and field.default is not ...:
            value = field.default
        elif type(value) not in (kind, int if number else kind) or number and not (
                field.least <= value <= field.most):
            bounds = f" from {field.least:,} to {field.most:,}" * (number and field.most < LIMIT)
            raise UserError(f"{source}: {name} must be {EXPECTED[kind]}{bounds}, not {shown(value)}")
        values[name] = float(value) if kind is float and type(value) is int else value
    return values


def help_text(kind: type, about: str, positional: str = "") -> str:
    """--help, from the comments beside the fields of the dataclass `kind` and the lines between them."""
    rows = []
    for line in inspect.getsource(kind).split("    def ")[0].splitlines():
        if found := re.match(r"    (\w+): (\w+) = .+?  # (.+)$", line):
            name, type, comment = found.groups()
            flag = name.upper() if name in positional.split() else f"--{name}"
            rows += textwrap.wrap(f"  {flag:24}{type:7}{comment} [{getattr(kind, name)!r}]", 100,
                                  subsequent_indent=" " * 33, break_on_hyphens=False)
        elif rows and (found := re.match(r"    # (.+)$|$", line)):
            rows.append(found[1] or "")
    parts = [x if x[:1] == " " else textwrap.fill(x, 100) for x in about.strip().split("\n\n")]
    return "\n".join(["\n\n".join(parts), "", "Options, with their defaults:", *rows]).rstrip()


def convert(config: type, name: str, value, source: str, others: tuple[str, ...] = ()):
    """A string or JSON value, converted to the type of the field `name`. Raises UserError."""
    fields = {f.name: f for f in dataclasses.fields(config)}
    if name not in fields:
        near = difflib.get_close_matches(name, [*fields, *others], 1)
        raise UserError(f"{source}: there is no option {shown(name)}" +
                        (f"; did you mean {near[0]!r}?" if near else "; see --help"))
    kind = fields[name].type
    if isinstance(value, str):
        if re.search("[\0\ud800-\udfff]", value):
            raise UserError(f"{source}: {name} must be UTF-8 without NUL, not {shown(value)}")
        with suppress(KeyError, ValueError):  # `typed` reports a value that has not been converted
            value = (value,) if kind is tuple else BOOLS[value.lower()] if kind is bool else kind(value)
    return typed({name: value}, source, {name: Field(kind)})[name]


def parse(config: type, arguments: list[str], about: str, positional: str = ""):
    """An instance of `config` with the values that `read` finds."""
    return config(**read(config, arguments, about, positional=positional)[0])


def read(config: type, arguments: list[str], about: str, others: tuple[str, ...] = (),
         positional: str = "") -> tuple[dict, list[str]]:
    """Values by name from `--config FILE.json` and `--NAME VALUE` (or --NAME=VALUE), of which later ones win;
    and the config files.

    about: the introduction of --help. others: further names to suggest for a misspelt one. positional: names
    of required fields, separated by spaces, whose values are given without --NAME and in this order; a field
    of type tuple takes all remaining values. Raises UserError.
    """
    values, files, rest, places = {}, [], [], positional.split()
    for argument in arguments:
        rest += argument.split("=", 1) if argument.startswith("--") and "=" in argument else [argument]
    while rest:
        name = rest.pop(0)
        if name in ("-h", "--help"):
            print(help_text(config, about, positional))
            raise SystemExit(0)
        if places and not name.startswith("-"):
            value = convert(config, places[0], name, "command line")
            values[places[0]] = values.get(places[0], ()) + value if isinstance(value, tuple) else value
            places = places[isinstance(value, str):]
            continue
        if not name.startswith("--"):
            raise UserError(f"command line: {shown(name)} is not an option; write --NAME VALUE")
        if not rest:
            raise UserError(f"command line: {name} lacks its value")
        name, value = name[2:].replace("-", "_"), rest.pop(0)
        if name == "config":
            files.append(value)
            loaded = read_json(value, "give a JSON object of options")
            values |= {k: convert(config, k, v, value) for k, v in loaded.items()
                       if not k.startswith("//")}  # a comment
        else:
            values[name] = convert(config, name, value, "command line", others)
    if missing := [name.upper() for name in positional.split() if name not in values]:
        raise UserError(f"command line: {missing[0]} is missing; see --help")
    return values, files


def check_numbers(config, positive: str = "", not_negative: str = "", **ranges: tuple[float, float]):
    """Checks that the named fields, separated by spaces, are above 0, or at least 0, and at most LARGEST;
    others against their own (least, most). Raises UserError."""
    ranges = (dict.fromkeys(positive.split(), (1e-9, LARGEST))
              | dict.fromkeys(not_negative.split(), (0, LARGEST)) | ranges)
    for name, (least, most) in ranges.items():
        if not least <= (value := getattr(config, name)) <= most:
            least = "positive" if least == 1e-9 else f"at least {least:,}"
            raise UserError(f"{name} must be {f'at most {most:,}' if value > most else least}, not {value}")


def check_choices(config, **choices: tuple[str, ...]):
    """Checks that each named field has one of the given values. Raises UserError."""
    for name, values in choices.items():
        if getattr(config, name) not in values:
            raise UserError(f"{name} must be one of {', '.join(values)}, not {getattr(config, name)!r}")
