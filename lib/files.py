"""JSON lines, atomic and durable writes, and paths inside the repository; without torch."""

import json
import os
from pathlib import Path

from lib.options import Field, UserError, parse_json, typed

ROOT = Path(__file__).parent.parent


def locate(path: str) -> str:
    """The path as given or, where it does not exist, the one of the same name inside the repository."""
    return path if Path(path).exists() or not (ROOT / path).exists() else str(ROOT / path)


def replace(file: Path, text: str):
    """Writes beside and renames, so that a crash leaves the old file or the new one."""
    beside = Path(f"{file}.writing")
    beside.write_text(text, encoding="utf-8")
    beside.replace(file)


def write_durably(file: Path, text: str):
    """Returns when the text is on the disk."""
    with file.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def jsonl(records: list[dict]) -> str:
    """A JSON object a line."""
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)


def write_jsonl(file: Path, records: list[dict], mode: str = "w"):
    """Writes a JSON object a line; mode "a" appends. Raises UserError."""
    try:
        with file.open(mode, encoding="utf-8") as f:
            f.write(jsonl(records))
    except OSError as e:
        raise UserError(f"{file} cannot be written ({e.strerror}): make room, or mend it, and the same "
                        "command goes on") from None


def read_jsonl(file: Path, remedy: str = "put it back", /, **fields: Field) -> list[dict]:
    """The records of a file, without a last line that is still being written; each must have the fields.
    Raises UserError."""
    records = []
    try:
        for line in file.read_bytes().split(b"\n")[:-1]:
            records.append(parse_json(line))
            typed(records[-1], f"{file}, line {len(records)}", fields)
    except (OSError, ValueError) as e:
        raise UserError(f"{file} cannot be read at line {len(records) + 1} ({e}): {remedy}") from None
    return records


def read_parts(folder: Path, name: str, **fields: Field) -> list[dict]:
    """The records of NAME.jsonl and of the NAME.part-RANK.jsonl that ranks append to; a last line that a kill
    has torn is cut off, so that more can be appended. Raises UserError."""
    records = []
    for file in sorted(folder.glob(f"{name}*.jsonl")):
        os.truncate(file, file.read_bytes().rfind(b"\n") + 1)
        records += read_jsonl(file, "choose another --out", **fields)
    return records


def merge_parts(folder: Path, name: str, records: list[dict]):
    """Makes NAME.jsonl of all records, and removes the parts."""
    replace(folder / f"{name}.jsonl", jsonl(records))
    for part in folder.glob(f"{name}.part-*.jsonl"):
        part.unlink()
