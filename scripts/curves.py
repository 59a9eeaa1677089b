"""Curves of runs as one picture: a panel for each metric, a line for each run.

    python -m scripts.curves runs/NAME [runs/OTHER ...] [--metrics NAMES] [--out curves.svg]

--metrics: comma-separated names or patterns out of metrics.jsonl, by default all rewards, held-out and in
training. A run that is still going on is drawn as far as it is. The SVG needs nothing but a browser.
"""

import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from lib import options
from lib.files import read_jsonl, replace
from lib.options import Field, UserError
from viewer.plots import Curve, coloured, picture


@dataclass
class Config:
    runs: tuple = ()  # their folders
    metrics: str = "eval/reward/*,reward/*"  # comma-separated names or patterns
    out: str = "curves.svg"  # the picture


def curves(runs: tuple[str, ...], patterns: list[str]) -> dict[str, dict[str, Curve]]:
    """curves[metric][run]: the metrics that match, in the order of the patterns; null values are left out."""
    lines = {run: read_jsonl(Path(run, "metrics.jsonl"), "give the folder of a run, as runs/NAME",
                             step=Field(int)) for run in runs}
    seen = dict.fromkeys(name for metrics in lines.values() for m in metrics for name in m)
    chosen = dict.fromkeys(name for pattern in patterns for name in seen if fnmatch(name, pattern))
    found = {name: {run: points for run, metrics in lines.items() if (points := [
                 (m["step"], m[name]) for m in metrics if type(m.get(name)) in (int, float)])}
             for name in chosen}
    if not any(found.values()):
        raise UserError(f"--metrics {','.join(patterns)} is in no metrics.jsonl of {', '.join(lines)}: "
                        f"they have {', '.join(seen) or 'no line yet'}")
    return {name: by_run for name, by_run in found.items() if by_run}


@options.command
def main():
    config = options.parse(Config, sys.argv[1:], __doc__, "runs")
    panels = curves(config.runs, config.metrics.split(","))
    replace(Path(config.out), picture(panels, coloured(list(config.runs)), "against GRPO steps"))
    print(f"{config.out}: {', '.join(panels)}")


if __name__ == "__main__":
    main()
