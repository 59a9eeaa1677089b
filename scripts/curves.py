"""Curves of runs as one picture: a panel for each metric, a line for each run.

    python -m scripts.curves runs/NAME [runs/OTHER ...] [--metrics 'eval/reward/*,entropy'] [--out curves.svg]

--metrics: comma-separated names or patterns out of metrics.jsonl, by default all rewards, held-out and in
training. A run that is still going on is drawn as far as it is. The SVG needs nothing but a browser.
"""

import argparse
from fnmatch import fnmatch
from pathlib import Path

from lib import options
from lib.files import read_jsonl, replace
from lib.options import UserError
from viewer.plots import Curve, coloured, picture


def read_metrics(run: Path) -> list[dict]:
    file = run / "metrics.jsonl"
    try:
        found = read_jsonl(file)
        if not all(isinstance(m, dict) and "step" in m for m in found):
            raise ValueError("a line is no object with `step`")
        return found
    except (OSError, ValueError) as e:
        raise UserError(f"{file} cannot be read ({e}): give the folder of a run, as runs/NAME") from None


def curves(runs: list[Path], patterns: list[str]) -> dict[str, dict[str, Curve]]:
    """curves[metric][run]: the metrics that match, in the order of the patterns; null values are left out."""
    lines = {str(run): read_metrics(run) for run in runs}
    seen = dict.fromkeys(name for metrics in lines.values() for m in metrics for name in m)
    chosen = dict.fromkeys(name for pattern in patterns for name in seen if fnmatch(name, pattern))
    found = {name: {run: points for run, metrics in lines.items()
                    if (points := [(m["step"], m[name]) for m in metrics if m.get(name) is not None])}
             for name in chosen}
    if not any(found.values()):
        raise UserError(f"--metrics {','.join(patterns)} is in no metrics.jsonl of {', '.join(lines)}: "
                        f"they have {', '.join(seen) or 'no line yet'}")
    return {name: by_run for name, by_run in found.items() if by_run}


@options.command
def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--metrics", default="eval/reward/*,reward/*")
    parser.add_argument("--out", type=Path, default=Path("curves.svg"))
    args = parser.parse_args()
    panels = curves(args.runs, args.metrics.split(","))
    replace(args.out, picture(panels, coloured([str(run) for run in args.runs]), "against GRPO steps"))
    print(f"{args.out}: {', '.join(panels)}")


if __name__ == "__main__":
    main()
