"""A report as one HTML file: tables, pictures, a reader of answers side by side. It needs no network.

What a model or a judge wrote reaches the page as text alone: in Python through `escape`, in the script
through textContent, between the two as JSON without "<". A policy in the head forbids other scripts and
all loads.
"""

import base64
import hashlib
import json
import math
from html import escape
from pathlib import Path

from viewer.plots import COLOURS, label, line

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


def chip(section: dict, name: str) -> str:
    """A name, after the colour of the result that it is."""
    labels = [r["label"] for r in section["results"]]
    dot = f'<i class=dot style="{colour(labels.index(name))}"></i>' if name in labels else ""
    return f"<span class=chip>{dot}{escape(name)}</span>"


def table(section: dict, rows: list[list[str]]) -> str:
    body = "".join(f"<tr><th>{'<td>'.join(chip(section, cell) for cell in row)}" for row in rows)
    return f"<div class=wide><table>{body}</table></div>"


def scatter(reader: dict, number: int, column: int, low: float, high: float) -> str:
    """Words asked for against words written, both logarithmic; what has no answer lies on the floor."""
    size, left, top = 300, 44, 8

    def at(x: float, y: float) -> tuple[float, float]:
        x, y = (math.log(max(v, low) / low) / math.log(high / low) for v in (x, y))
        return left + size * x, top + size * (1 - y)

    parts = []
    for mark in (m * 10**k for k in range(7) for m in (1, 2, 5) if low <= m * 10**k <= high):
        (x, floor), (_, y) = at(mark, low), at(low, mark)
        name = f"{mark // 1000}k" if mark >= 1000 else str(mark)
        parts += [line([(x, floor), (x, top)]), label(x, floor + 15, name, text_anchor="middle"),
                  line([(left, y), (left + size, y)]), label(left - 6, y + 4, name, text_anchor="end")]
    parts += [line([at(low, low), at(high, high)], stroke_dasharray="3 4"),
              label(left + size, floor + 31, "words asked for", text_anchor="end"),
              label(left + 5, top + 12, "words written")]
    for i, record in enumerate(reader["records"]):
        if record["required"] and (answer := record["answers"][column]):
            x, y = at(record["required"], answer["words"])
            title = f"asked for {record['required']:,}, wrote {answer['words']:,}: {record['query'][:110]}"
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" data-at="{number} {i} {column}">'
                         f"<title>{escape(title)}</title></circle>")
    return (f'<svg viewBox="0 0 {left + size + 12} {top + size + 36}" style="{colour(column)}" role=img '
            f'aria-label="words asked for against words written">{"".join(parts)}</svg>')


def scatters(section: dict, reader: dict, number: int) -> str:
    asked = [r for r in reader["records"] if r["required"]]
    if not asked:
        return ""
    words = [n for r in asked for n in (r["required"], *(a["words"] for a in r["answers"] if a)) if n]
    low, high = 0.8 * max(10, min(words)), 1.25 * max(20, *words)
    panels = "".join(f"<div>{chip(section, name)}{scatter(reader, number, i, low, high)}</div>"
                     for i, name in enumerate(reader["labels"]))
    return ("<figure><figcaption><b>Length</b> in words (Chinese: characters): on the dashed line as asked "
            f"for, at the bottom no answer</figcaption><div class=panels>{panels}</div></figure>")


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


def section_html(section: dict, reader: dict, number: int) -> str:
    scores, texts = (table(section, score_rows(section, kind)) for kind in ("scores", "texts"))
    about = (f"<li>{chip(section, name)} {escape(text)}" for name, text in section["about"].items())
    method = ("<p class=muted>Differences: the second less the first, over the records of both. Intervals "
              "by paired bootstrap, p after Holm.</p>") * bool(section["differences"])
    return "".join([
        f"<section><h2>{section['title']}</h2><ul class=about>",
        *about, "</ul>", *(f"<p class=note>{escape(note)}</p>" for note in section["notes"]),
        scores, method,
        *(elo(section, fit) for fit in section["elo"]), scatters(section, reader, number),
        "<div class=figures>", *(bars(section, family) for family in BARS), "</div>",
        f"<h3>The texts, without a judge</h3>{texts}</section>"])


def render(sections: list[dict], readers: list[dict]) -> str:
    """The page of a report; readers[i]: the answers of sections[i], as scripts.report gathers both."""
    colours = "".join(f"--c{i}:{c};" for i, c in enumerate(COLOURS))
    dark = "".join(f"--c{i}:color-mix(in srgb,{c} 55%,white);" for i, c in enumerate(COLOURS))
    ours = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{ours}'"
    data = json.dumps([{"title": s["title"]} | reader for s, reader in zip(sections, readers)],
                      ensure_ascii=False).replace("<", r"\u003c")
    return f"""<!doctype html>
<html lang=en>
<meta charset=utf-8>
<meta http-equiv=Content-Security-Policy content="{policy}">
<meta name=viewport content="width=device-width,initial-scale=1">
<link rel=icon href="data:,">
<title>Evaluation: {escape(", ".join(section["title"] for section in sections))}</title>
<style>:root{{{colours}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}{STYLE}</style>
<main>
<h1>Evaluation</h1>
{"".join(map(section_html, sections, readers, range(len(sections))))}
<section id=reader>
<h2>Side by side</h2>
<nav><button id=back aria-label="record before">←</button><select id=record aria-label=record></select>
<button id=next aria-label="next record">→</button><span class=muted>or the arrow keys</span></nav>
<p id=facts class=muted></p><div id=query class=text></div><div id=panes></div>
</section>
</main>
<script type=application/json id=data>{data}</script>
<script>{SCRIPT}</script>
</html>
"""
