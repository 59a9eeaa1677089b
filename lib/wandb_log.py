"""Logging to Weights & Biases, which never stops or delays a run for long."""

import dataclasses
import hashlib
import os
from collections.abc import Callable
from pathlib import Path


class Wandb:
    """A run at Weights & Biases, or none: what fails there is warned of once, and training goes on."""
    def __init__(self, run, warn: Callable[[str], None]):
        self.run, self.warn = run, warn

    def send(self, call: Callable):
        """Calls it with the run, if there is one."""
        try:
            if self.run:
                call(self.run)
        except Exception as e:
            self.run = None
            self.failed(e, "goes on without it, and metrics.jsonl holds every step")

    def failed(self, error: Exception, consequence: str):
        self.warn(f"warning: wandb failed ({' '.join(str(error).split())[:200]}): this run {consequence}")


def table(records: list[dict]):
    """Whole samples as a table, a column for each field and reward."""
    import wandb
    rows = [record | {f"reward/{name}": x for name, x in record["rewards"].items()} for record in records]
    columns = [name for name, x in rows[0].items() if not isinstance(x, dict)]
    return wandb.Table(columns, [[row.get(name) for name in columns] for row in rows])


def artifact(folder: Path, name: str):
    """The run's options and the source that it runs."""
    import wandb
    found = wandb.Artifact(f"source-{name}", "source")
    found.add_file(str(folder / "config.json"))
    for source in sorted(folder.glob("source*")):
        found.add_dir(str(source), source.name)
    return found


def open_wandb(config, folder: Path, warn: Callable[[str], None]) -> Wandb:
    """Online if there is a key and the server answers in time, else offline, else none."""
    has_key = bool(os.environ.get("WANDB_API_KEY")) or (Path.home() / ".netrc").exists()
    mode = os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
    options = {"project": "longwriter-zero", "name": folder.name, "resume": "allow", "dir": str(folder),
               "id": hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
               "config": dataclasses.asdict(config)}
    limits, log = {"login_timeout": 5, "init_timeout": 10, "finish_timeout": 60}, Wandb(None, warn)  # seconds
    try:
        import wandb
        try:
            log.run = wandb.init(mode=mode, settings=limits, **options)
        except Exception as e:
            wandb.teardown()  # its service holds on to the id
            log.run = wandb.init(mode="offline", **options)
            log.failed(e, f"logs offline; later: wandb sync {folder}/wandb/offline-run-*")
    except Exception as e:
        log.failed(e, "goes on without it; pip install wandb if it is missing, or leave --wandb out")
    log.send(lambda run: run.log_artifact(artifact(folder, options["id"])))
    return log
