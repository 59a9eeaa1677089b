"""A report as an HTML file: tables, curves, a reader of texts side by side. It needs no network.

What a model or a judge wrote reaches the page as text alone: in Python through `escape`, in the script
through textContent, between the two as JSON without "<". A policy in the head forbids all loads and all
scripts but ours, by its hash, and those that it adds ('strict-dynamic'): the files of data of viewer/runs.py.
"""

import base64
import hashlib
import json
from html import escape
from pathlib import Path

from text import REQUESTED
from viewer.plots import COLOURS

STYLE, SCRIPT = (Path(__file__).with_name(name).read_text(encoding="utf-8")
                 for name in ("page.css", "page.js"))

BARS = {"S_l": "Length score by words asked for", "S_q": "Quality by dimension", "domain1": "By domain",
        "domain2": "By sub-domain", "win_rate": "Win rate over each baseline"}

# ---------------------------------------------------------------------- rows, for the terminal too


def shown(values: list, sign: str = "") -> list[str]:
    """Numbers with as many digits as the largest of them needs; a missing one is a dash."""
    there = [abs(x) for x in values if x is not None]
    top, whole = max(there, default=0), all(isinstance(x, int) or x == 0 for x in there)
    digits = 0 if whole or top >= 1000 else 1 if top >= 10 else 2 if top >= 1 else 3
    return ["–" if x is None else f"{x:{sign},.{digits}f}" for x in values]


def score_rows(section: dict, kind: str) -> list[list[str]]:
    """A head and a row a score (or, of kind `texts`, a statistic): its values and, of two results, what
    the second has more than the first. The sub-domains, a hundred, are left to the page's bars."""
    differences = section["differences"]
    rows = [["", *(r["label"] for r in section["results"])]]
    if differences:
        rows[0] += ["difference", "95 %", "p", ""]
    for name, values in section[kind].items():
        if not name.startswith("domain2/"):
            rows.append([name + "*" * (name in section["judged_apart"]), *shown(values)])
            if d := differences.get(name):
                difference, low, high = shown([d["difference"], d["lo"], d["hi"]], "+")
                p = f"{d['adjusted']:.3f}" if d["adjusted"] >= 0.0005 else "<0.001"
                rows[-1] += [difference, f"{low} to {high}", p, "real" * d["real"]]
    return [row + [""] * (len(rows[0]) - len(row)) for row in rows]


def elo_rows(fit: dict) -> list[list[str]]:
    rows = [["", "Elo", "95 %", "games", "won", "tied", "lost"]]
    for name, p in fit["players"].items():
        interval = "pinned" if p["pinned"] else f"{p['lo']:.0f} to {p['hi']:.0f}"
        rows.append([name, f"{p['rating']:.0f}", interval,
                     *(str(p[count]) for count in ("games", "wins", "ties", "losses"))])
    return rows


# ---------------------------------------------------------------------- pictures


def colour(i: int) -> str:
    return f"--c:var(--c{i % len(COLOURS)})"


def chip(shown: list[dict], name: str) -> str:
    """A name, after the colour of the result or run that has it as its label."""
    labels = [x["label"] for x in shown]
    dot = f'<i class=dot style="{colour(labels.index(name))}"></i>' if name in labels else ""
    return f"<span class=chip>{dot}{escape(name)}</span>"


def table(section: dict, rows: list[list[str]]) -> str:
    results = section["results"]
    body = "".join(f"<tr><th>{'<td>'.join(chip(results, cell) for cell in row)}" for row in rows)
    return f"<div class=wide><table>{body}</table></div>"


def bars(section: dict, family: str) -> str:
    rows = {name: values for name, values in section["scores"].items() if name.startswith(family + "/")}
    body = ""
    for name, values in rows.items():
        lines = "".join(f'<div class=bar style="{colour(i)}"><i style="width:'
                        f'{100 * (x or 0) / section["scale"]:.1f}%"></i>{text}</div>'
                        for i, (x, text) in enumerate(zip(values, shown(values))))
        mark = "*" * (name in section["judged_apart"])
        body += f"<span>{escape(name.partition('/')[2])}{mark}</span><div>{lines}</div>"
    folded = "" if family == "domain2" else " open"
    return body and (f"<details class=figure{folded}><summary><b>{BARS[family]}</b>, of "
                     f"{section['scale']}</summary><div class=bars>{body}</div></details>")


def elo(section: dict, fit: dict) -> str:
    return (f"<figure><figcaption><b>Elo</b> and 95 % intervals, judge {escape(fit['judge'])}; "
            f"{fit['rounds']:,} rounds, seed {fit['seed']}</figcaption>"
            f"{table(section, elo_rows(fit))}</figure>")


# ---------------------------------------------------------------------- the page


def section_html(section: dict) -> str:
    scores, texts = (table(section, score_rows(section, kind)) for kind in ("scores", "texts"))
    results = section["results"]
    about = (f"<li>{chip(results, name)} {escape(text)}" for name, text in section["about"].items())
    method = ("<p class=muted>Differences: the second less the first, over the records of both. Intervals "
              "by paired bootstrap, p after Holm.</p>") * bool(section["differences"])
    return "".join([
        f"<section><h2>{section['title']}</h2><ul class=about>",
        *about, "</ul>", *(f"<p class=note>{escape(note)}</p>" for note in section["notes"]),
        scores, method,
        *(elo(section, fit) for fit in section["elo"]),
        "<div class=figures>", *(bars(section, family) for family in BARS), "</div>",
        f"<h3>The texts, without a judge</h3>{texts}</section>"])


def runs_html(runs: list[dict], diff: str) -> str:
    """Where the script draws the curves, after what differs between two runs."""
    names = "".join(f"{chip(runs, run['label'])} " for run in runs)
    kinds = {"+": "new", "-": "old"}
    lines = "".join(f"<span class={kinds.get(x[:1], 'same')}>{escape(x)}\n</span>" for x in diff.split("\n"))
    between = f"<details class=figure><summary>what differs</summary><pre>{lines}</pre></details>"
    return (f"<section><h2>Curves</h2><p>{names}<span class=muted>shaded: from the 10th to the 90th "
            f"percentile of the samples</span></p>{between * bool(diff)}<div id=curves></div></section>"
            ) * bool(runs)


def render(sections: list[dict], views: list[dict], runs: list[dict], diff: str, folder: str) -> str:
    """The page. sections: comparisons of results. views: what the reader can open, with its `groups` or the
    `key` of a file in the folder of data. runs, diff: as viewer.runs.gather returns them."""
    colours = "".join(f"--c{i}:{c};" for i, c in enumerate(COLOURS))
    dark = "".join(f"--c{i}:color-mix(in srgb,{c} 55%,white);" for i, c in enumerate(COLOURS))
    ours = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
              f"script-src 'sha256-{ours}' 'strict-dynamic'")
    data = json.dumps({"folder": folder, "views": views, "runs": runs, "requested": REQUESTED},
                      ensure_ascii=False).replace("<", r"\u003c")
    title = ", ".join([*(run["label"] for run in runs), *(section["title"] for section in sections)])
    kind = "Evaluation" if sections else "Runs"
    return f"""<!doctype html>
<html lang=en>
<meta charset=utf-8>
<meta http-equiv=Content-Security-Policy content="{policy}">
<meta name=viewport content="width=device-width,initial-scale=1">
<link rel=icon href="data:,">
<title>{kind}: {escape(title)}</title>
<style>:root{{{colours}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}{STYLE}</style>
<main>
<h1>{kind}</h1>
{"".join(map(section_html, sections))}{runs_html(runs, diff)}
<section id=reader>
<h2>Texts</h2>
<nav><select id=view aria-label="benchmark or step"></select>
<button id=back aria-label="record before">←</button><select id=record aria-label=record></select>
<button id=next aria-label="next record">→</button><span class=muted>or the arrow keys</span></nav>
<nav><input id=needle type=search placeholder="search here"><span id=found class=muted></span>
<select id=quantity aria-label="along the text"><option>entropy<option>surprise<option>gap</select></nav>
<div id=lengths></div><p id=facts class=muted></p><div id=elsewhere></div>
<div id=query class=text></div><div id=panes></div>
</section>
</main>
<script type=application/json id=data>{data}</script>
<script>{SCRIPT}</script>
</html>
"""
