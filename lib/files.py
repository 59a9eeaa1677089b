"""JSON lines, atomic writes and paths inside the repository; without torch."""

import json
import os
from pathlib import Path

from lib.options import Field, UserError, parse_json, typed

ROOT = Path(__file__).parent.parent


def locate(path: str) -> str:
    """The path as given or, where it does not exist, the one of the same name inside the repository."""
    return path if Path(path).exists() or not (ROOT / path).exists() else str(ROOT / path)


def replace(file: Path, text: str):
    """Writes the text to the disk under another name, then renames that file: a crash leaves the old text or
    the new one."""
    beside = Path(f"{file}.writing")
    with beside.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    beside.replace(file)


def jsonl(records: list[dict]) -> str:
    """One JSON object per line."""
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)


def write_jsonl(file: Path, records: list[dict], mode: str = "w"):
    """Writes one JSON object per line; mode "a" appends. Raises UserError."""
    try:
        with file.open(mode, encoding="utf-8") as f:
            f.write(jsonl(records))
    except OSError as e:
        raise UserError(f"{file} cannot be written ({e.strerror}): make room, or mend it, and the same "
                        "command goes on") from None


def read_jsonl(file: Path, remedy: str = "put it back", /, **fields: Field) -> list[dict]:
    """The records of a file, except a last line that is incomplete; each must have the fields. Raises
    UserError."""
    records = []
    try:
        for line in file.read_bytes().split(b"\n")[:-1]:
            records.append(parse_json(line))
            typed(records[-1], f"{file}, line {len(records)}", fields)
    except (OSError, ValueError) as e:
        raise UserError(f"{file} cannot be read at line {len(records) + 1} ({e}): {remedy}") from None
    return records


def read_parts(folder: Path, name: str, **fields: Field) -> list[dict]:
    """The records of NAME.jsonl and of the NAME.part-RANK.jsonl that ranks append to. Cuts off a last line
    that a kill has left incomplete. Raises UserError."""
    records = []
    for file in sorted(folder.glob(f"{name}*.jsonl")):
        os.truncate(file, file.read_bytes().rfind(b"\n") + 1)
        records += read_jsonl(file, "choose another --out", **fields)
    return records


def merge_parts(folder: Path, name: str, records: list[dict]):
    """Writes all records to NAME.jsonl, then removes the parts."""
    replace(folder / f"{name}.jsonl", jsonl(records))
    for part in folder.glob(f"{name}.part-*.jsonl"):
        part.unlink()
