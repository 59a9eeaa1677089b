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

from viewer.plots import COLOURS, label, line

BARS = {"S_l": "Length score by words asked for", "S_q": "Quality by dimension", "domain1": "By domain",
        "domain2": "By sub-domain", "win_rate": "Win rate over each baseline"}
MARKS = {"en": "M-3,0 A3,3 0 1 1 3,0 A3,3 0 1 1 -3,0 Z", "zh": "M-3.6,0 L0,-3.6 3.6,0 0,3.6 Z",
         "none": "M-3,-3 L3,3 M-3,3 L3,-3"}

# ---------------------------------------------------------------------- rows, for the terminal too


def shown(values: list, sign: str = "") -> list[str]:
    """Numbers with as many digits as the largest of them needs; a missing one is a dash."""
    there = [abs(x) for x in values if x is not None]
    top, whole = max(there, default=0), all(isinstance(x, int) or x == 0 for x in there)
    digits = 0 if whole or top >= 1000 else 1 if top >= 10 else 2 if top >= 1 else 3
    return ["–" if x is None else f"{x:{sign},.{digits}f}" for x in values]


def score_rows(section: dict, kind: str) -> list[list[str]]:
    """A head and a row a score (or, of kind `texts`, a statistic): its values and, of two results, what
    the second has more than the first. The sub-domains, a hundred, are left to the page's bars, and how
    games with one baseline ended, beside the win rate, to the JSON."""
    differences = section["differences"]
    rows = [["", *(r["label"] for r in section["results"])]]
    if differences:
        rows[0] += ["difference", "95 %", "p", ""]
    for name, values in section[kind].items():
        if not name.startswith(("domain2/", "win/", "tie/", "loss/")):
            rows.append([name + "*" * (name in section["judged_apart"]), *shown(values)])
            if d := differences.get(name):
                difference, low, high = shown([d["difference"], d["lo"], d["hi"]], "+")
                p = f"{d['adjusted']:.3f}" if d["adjusted"] >= 0.0005 else "<0.001"
                rows[-1] += [difference, f"{low} to {high}", p, "real" * d["real"]]
    return [row + [""] * (len(rows[0]) - len(row)) for row in rows]


def elo_rows(fit: dict) -> list[list[str]]:
    rows = [["", "Elo", "95 %", "games", "won", "tied", "lost", "win rate", "consistent"]]
    for name, p in fit["players"].items():
        interval = "pinned" if p["pinned"] else f"{p['lo']:.0f} to {p['hi']:.0f}"
        rate = (p["wins"] + p["ties"] / 2) / p["games"] if p["games"] else None
        rows.append([name, f"{p['rating']:.0f}", interval, *map(str, (p["games"], p["wins"], p["ties"],
                    p["losses"])), *shown([rate]), *shown([p["consistency"]])])
    return rows


# ---------------------------------------------------------------------- pictures


def colour(i: int) -> str:
    return f"--c:var(--c{i % len(COLOURS)})"


def chip(section: dict, name: str) -> str:
    """A name, after the colour of the result that it is."""
    labels = [r["label"] for r in section["results"]]
    dot = f'<i class=dot style="{colour(labels.index(name))}"></i>' if name in labels else ""
    return f"<span class=chip>{dot}{escape(name)}</span>"


def table(section: dict, rows: list[list[str]], pictures: list[str] | None = None) -> str:
    """pictures[i]: what stands after the first cell of row i, as HTML."""
    def cells(i: int, row: list[str]) -> list[str]:
        plain = [chip(section, cell) for cell in row]
        return plain if pictures is None else [plain[0], pictures[i], *plain[1:]]

    body = "".join(f"<tr><th>{'<td>'.join(cells(i, row))}" for i, row in enumerate(rows))
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
            kind = record["language"] if answer["words"] else "none"
            parts.append(f'<path class={kind} d="{MARKS[kind]}" transform="translate({x:.1f} {y:.1f})" '
                         f'data-at="{number} {i} {column}"/>')
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
    key = {kind: f'<svg class=key viewBox="-5 -5 10 10"><path class={kind} d="{path}"/></svg>'
           for kind, path in MARKS.items()}
    return (f"<figure><figcaption><b>Length</b>, {key['en']} English, {key['zh']} Chinese (characters), "
            f"{key['none']} no answer; on the dashed line as asked for</figcaption>"
            f"<div class=panels>{panels}</div></figure>")


def bars(section: dict, family: str) -> str:
    rows = {name: values for name, values in section["scores"].items() if name.startswith(family + "/")}
    body = ""
    for name, values in rows.items():
        lines = "".join(f'<div class=bar style="{colour(i)}"><i style="width:'
                        f'{100 * (x or 0) / section["scale"]:.1f}%"></i>{text}</div>'
                        for i, (x, text) in enumerate(zip(values, shown(values))))
        body += f"<span>{escape(name.partition('/')[2])}</span><div>{lines}</div>"
    folded = "" if family == "domain2" else " open"
    apart = ", by different judges" * any(name in section["judged_apart"] for name in rows)
    return body and (f"<details class=figure{folded}><summary><b>{BARS[family]}</b>, of "
                     f"{section['scale']}{apart}</summary><div class=bars>{body}</div></details>")


def elo(section: dict, fit: dict) -> str:
    players, tracks = fit["players"].values(), [""]
    low, high = min(p["lo"] for p in players), max(p["hi"] for p in players)
    for p in players:  # within 4 to 96 %: a dot at the end would be cut
        start, end, middle = (4 + 92 * (p[x] - low) / ((high - low) or 1) for x in ("lo", "hi", "rating"))
        tracks.append(f'<div class=track><i style="left:{start:.1f}%;width:{end - start:.1f}%"></i>'
                      f'<b style="left:{middle:.1f}%"></b></div>')
    return (f"<figure><figcaption><b>Elo</b> and 95 % intervals, judge {escape(fit['judge'])}; "
            f"{fit['rounds']:,} rounds, seed {fit['seed']}</figcaption>"
            f"{table(section, elo_rows(fit), tracks)}</figure>")


# ---------------------------------------------------------------------- the page


def section_html(section: dict, reader: dict, number: int) -> str:
    scores, texts = (table(section, score_rows(section, kind)) for kind in ("scores", "texts"))
    about = (f"<li>{chip(section, name)} {escape(text)}" for name, text in section["about"].items())
    told = ("<p class=muted>Differences: the second less the first, over the records of both. Intervals "
            "by paired bootstrap, p after Holm.</p>") * bool(section["differences"])
    return "".join([
        f"<section><h2>{section['title']}</h2><ul class=about>",
        *about, "</ul>", *(f"<p class=note>{escape(note)}</p>" for note in section["notes"]),
        scores, told,
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
<div id=tip hidden><p></p><button>read it</button></div>
<script type=application/json id=data>{data}</script>
<script>{SCRIPT}</script>
</html>
"""


STYLE = """
:root{color-scheme:light dark;--ink:#222;--soft:#666;--rule:#ddd;--paper:#fff;--shade:#f5f5f3;
--c:var(--soft)}@media(prefers-color-scheme:dark){:root{--ink:#ddd;--soft:#999;--rule:#3a3a3a;
--paper:#171717;--shade:#222}}
*{box-sizing:border-box}
body{margin:0;color:var(--ink);background:var(--paper);font:15px/1.5 system-ui,"Noto Sans","PingFang SC",
"Hiragino Sans GB","Microsoft YaHei","Noto Sans CJK SC","Source Han Sans SC",sans-serif;
overflow-wrap:anywhere}
main{max-width:1180px;margin:0 auto;padding:0 20px}
section+section{border-top:1px solid var(--rule);margin-top:36px}
h1,h2,h3{font-weight:600;line-height:1.25;margin:28px 0 6px}
h1{font-size:24px}h2{font-size:20px}h3{font-size:16px}
p,ul{margin:4px 0}.muted{color:var(--soft)}
.note{border-left:3px solid var(--c1);padding-left:10px;margin:8px 0}
.about{list-style:none;padding:0;font-size:13px;color:var(--soft)}.about .chip{color:var(--ink)}
.dot{display:inline-block;width:9px;height:9px;border-radius:50%;background:var(--c);margin-right:5px}
.wide{overflow-x:auto;margin:12px 0}table{border-collapse:collapse;font-size:14px}
th,td{padding:2px 14px 2px 0;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap;
font-weight:400;font-variant-numeric:tabular-nums}
th{text-align:left;position:sticky;left:0;background:var(--paper);z-index:1}
.track{position:relative;width:220px;height:16px}
.track *{position:absolute;top:7px;height:3px;background:var(--c)}
.track b{width:9px;height:9px;border-radius:50%;margin:-3px 0 0 -4px;background:var(--ink)}
figure,.figure{margin:24px 0}figcaption,summary{margin-bottom:8px}summary{cursor:pointer}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr));gap:0 40px}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));gap:12px 28px}
svg{width:100%;height:auto;display:block;font-size:11px}text{fill:var(--soft)}
polyline{stroke:var(--rule)}polyline[stroke-dasharray]{stroke:var(--soft)}
path{stroke:var(--c);fill:var(--c);fill-opacity:.6;stroke-width:1.3}
path.zh{fill:var(--paper)}path.on{stroke:var(--ink);stroke-width:2.5}
.key{display:inline-block;width:12px;height:12px;vertical-align:-1px}
.bars{display:grid;grid-template-columns:minmax(90px,30%) 1fr;gap:7px 12px;align-items:center;
font-size:13px;line-height:1.25}.bars>span{text-align:right}
.bar{display:flex;align-items:center;gap:6px;height:15px;padding-right:44px;white-space:nowrap;
color:var(--soft);font-size:12px}
.bar i{background:var(--c);height:9px;flex:none;min-width:1px}
#tip{position:absolute;max-width:280px;background:var(--paper);border:1px solid var(--soft);
border-radius:4px;padding:8px 10px;font-size:13px;z-index:2}
#reader{min-height:100vh}nav{display:flex;gap:8px;align-items:center}nav select{flex:1;max-width:560px}
select,button{font:inherit;font-size:14px;color:inherit;background:var(--shade);padding:4px 8px;
min-width:0;border:1px solid var(--rule);border-radius:4px}button{cursor:pointer}
.text,dd{white-space:pre-wrap;margin:0 0 8px}
.text{font:16px/1.65 Georgia,"Noto Serif","Songti SC","Noto Serif CJK SC","Source Han Serif SC",SimSun,
serif;max-width:40em}.text:lang(zh){line-height:1.85}
#query{background:var(--shade);padding:10px 14px;margin:8px 0 16px;max-height:11em;overflow-y:auto;
max-width:none}
#panes{display:flex;gap:36px}article{flex:1;min-width:0}article select{max-width:92%}
article details{font-size:14px;margin:6px 0;color:var(--soft)}dt{color:var(--ink)}
.body{border-top:1px solid var(--rule);margin:8px 0;padding-top:8px;max-height:75vh;overflow:auto}
@media(max-width:700px){main{padding:0 14px}nav .muted{display:none}.track{width:120px}
#panes{gap:14px;overflow-x:auto;scroll-snap-type:x mandatory}
article{flex:0 0 92%;scroll-snap-align:start}article:only-child{flex-basis:100%}}
"""

SCRIPT = r"""
'use strict';
const $ = id => document.getElementById(id), count = n => n.toLocaleString('en'), picked = [0, 1];
const all = JSON.parse($('data').textContent).flatMap((section, s) =>
  section.records.map((record, r) => ({...section, ...record, s, r})));
let now = 0, lit = null;

function make(tag, text, more) {
  return Object.assign(document.createElement(tag), {textContent: text, ...more});
}
function fold(title, ...inside) {
  const details = make('details', '');
  details.append(make('summary', title), ...inside);
  return details;
}
function pane(side) {
  const {labels, judges, answers, language} = all[now], a = answers[picked[side]];
  const text = content => make('div', content, {className: 'text', lang: language});
  const article = make('article', ''), body = make('div', '', {className: 'body'});
  const dot = make('i', '', {className: 'dot', style: `--c:var(--c${picked[side] % 8})`});
  const select = make('select', '', {ariaLabel: 'result'});
  labels.forEach((name, value) => select.append(make('option', name, {value})));
  select.value = picked[side];
  select.onchange = () => { picked[side] = +select.value; show(now); };
  article.append(dot, select, make('p', a ? a.facts : 'has no such record', {className: 'muted'}), body);
  if (!a) return article;
  const verdicts = a.verdicts.flatMap(([head, why]) => [make('dt', head), make('dd', why)]);
  if (a.think) body.append(fold('thinking', text(a.think)));
  if (verdicts.length) body.append(fold(`verdicts of ${judges[picked[side]]}`, ...verdicts));
  if (a.answer) body.append(text(a.answer));
  else body.append(make('p', 'no answer'), fold('what there is', text(a.response)));
  return article;
}
function show(i) {
  now = (i + all.length) % all.length;
  const {title, labels, query, language, facts} = all[now], sides = [0, 1].slice(0, labels.length);
  for (const side of sides) if (picked[side] >= labels.length) picked[side] = side;
  $('record').value = now;
  $('facts').textContent = `${title} · ${facts}`;
  Object.assign($('query'), {textContent: query, lang: language});
  $('panes').replaceChildren(...sides.map(pane));
}
function light(path) {
  lit?.classList.remove('on');
  lit = path;
  $('tip').hidden = !path;
  if (!path) return;
  path.classList.add('on');
  const [s, r, column] = path.dataset.at.split(' ').map(Number), box = path.getBoundingClientRect();
  const i = all.findIndex(x => x.s === s && x.r === r), x = all[i], [told, button] = $('tip').children;
  told.lang = x.language;
  told.textContent = `asked for ${count(x.required)}, wrote ${count(x.answers[column].words)}: `
    + x.query.slice(0, 110);
  button.onclick = () => {
    if (picked[1] === column) picked[1] = picked[0];
    picked[0] = column;
    show(i);
    light(null);
    $('reader').scrollIntoView();
  };
  const room = document.documentElement.clientWidth - $('tip').offsetWidth - 8;
  $('tip').style.left = `${scrollX + Math.max(8, Math.min(box.left, room))}px`;
  $('tip').style.top = `${scrollY + box.bottom + 5}px`;
}
function near(event) {  // what a finger means
  let least = 16, path = null;
  for (const other of event.currentTarget.querySelectorAll('[data-at]')) {
    const {x, y, width, height} = other.getBoundingClientRect();
    const far = Math.hypot(x + width / 2 - event.clientX, y + height / 2 - event.clientY);
    if (far < least) [least, path] = [far, other];
  }
  if (path && path !== lit) light(path);
}

all.forEach(({title, id, query, language, r}, i) => {
  if (!r) $('record').append(make('optgroup', '', {label: title}));
  const option = make('option', `${id}  ${query.slice(0, 90)}`, {value: i, lang: language});
  $('record').lastChild.append(option);
});
$('record').onchange = () => show(+$('record').value);
$('back').onclick = () => show(now - 1);
$('next').onclick = () => show(now + 1);
document.onkeydown = event => {
  const step = {ArrowLeft: -1, ArrowRight: 1}[event.key], {altKey, ctrlKey, metaKey, target} = event;
  if (event.key === 'Escape') light(null);
  if (!step || altKey || ctrlKey || metaKey || target.tagName === 'SELECT') return;
  event.preventDefault();
  show(now + step);
};
document.onclick = event => { if (!event.target.closest('#tip, .panels svg')) light(null); };
for (const svg of document.querySelectorAll('.panels svg')) svg.onpointermove = svg.onpointerdown = near;
if (all.length) show(0);
"""
