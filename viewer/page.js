'use strict';
const $ = id => document.getElementById(id);
const {folder, views, runs, requested} = JSON.parse($('data').textContent);
const chunks = {}, waiting = {};
let view = 0, record = 0, groups = [], turn = 0;

function make(tag, text = '', more = {}) {
  return Object.assign(document.createElement(tag), {textContent: text}, more);
}
function svg(tag, attributes, ...inside) {
  const element = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const name in attributes) element.setAttribute(name, attributes[name]);
  element.append(...inside);
  return element;
}
function fold(title, ...inside) {
  const details = make('details');
  details.append(make('summary', title), ...inside);
  return details;
}
const number = x => x === null || x === undefined ? '–' : Math.abs(x) < 1e-3 && x ? x.toExponential(1)
  : x.toFixed(Math.abs(x) < 10 ? 3 : Math.abs(x) < 1000 ? 1 : 0);

// ---------------------------------------------------------------------- data files

function receive(key, found) { // what a data file calls
  document.currentScript.remove();
  waiting[key](found);
}
function load({key, groups}) { // the last 20 files stay in memory
  const loaded = Object.keys(chunks);
  if (loaded.length > 20) delete chunks[loaded[0]];
  return groups ?? (chunks[key] ??= new Promise((done, fail) => {
    waiting[key] = done;
    document.head.append(make('script', '', {src: encodeURI(`${folder}/${key}.js`), onerror: fail}));
  }));
}

// ---------------------------------------------------------------------- curves

const W = 300, H = 150, LEFT = 46, TOP = 8;

function frame(name, high, low, last, labels = [high, low].map(number)) {
  const readout = make('span', '', {className: 'muted'}), box = make('div');
  const picture = svg('svg', {viewBox: `0 0 ${W + LEFT + 8} ${H + TOP + 20}`});
  const at = (step, y) => `${LEFT + W * step / last},${TOP + H * (high - y) / (high - low || 1)}`;
  [TOP, TOP + H].forEach((y, i) => picture.append(svg('polyline', {points: `${LEFT},${y} ${LEFT + W},${y}`}),
    svg('text', {x: LEFT - 5, y: y + 4, 'text-anchor': 'end'}, labels[i])));
  picture.append(svg('text', {x: LEFT + W, y: TOP + H + 15, 'text-anchor': 'end'}, `step ${last}`));
  box.append(make('b', name), ' ', readout, picture);
  const hover = say => picture.onpointermove = event => {
    const {left, top, width} = picture.getBoundingClientRect(), scale = (W + LEFT + 8) / width;
    const x = ((event.clientX - left) * scale - LEFT) / W, y = ((event.clientY - top) * scale - TOP) / H;
    readout.textContent = x >= 0 && x <= 1 ? say(x * last, y) : '';
  };
  return {box, picture, at, hover};
}
const nearest = (steps, step) =>
  steps.reduce((best, s, i) => Math.abs(s - step) < Math.abs(steps[best] - step) ? i : best, 0);

function curve(name, last) {
  const lines = runs.map(({steps, metrics, bands}, i) => ({colour: `--c:var(--c${i % 8})`,
    points: steps.map((s, k) => [s, metrics[name]?.[k]]).filter(([, y]) => typeof y === 'number'),
    band: Object.entries(bands[name] ?? {}).map(([s, b]) => [+s, ...b]).sort((a, b) => a[0] - b[0])}));
  const ys = lines.flatMap(({points, band}) => [...points.map(p => p[1]), ...band.flatMap(b => b.slice(1))]);
  const {box, picture, at, hover} = frame(name, Math.max(...ys), Math.min(0, ...ys), last);
  for (const {colour, points, band} of lines) {
    const edge = [...band.map(b => at(b[0], b[2])), ...band.reverse().map(b => at(b[0], b[1]))];
    picture.append(svg('polygon', {points: edge.join(' '), style: colour}),
      svg('polyline', {class: 'curve', points: points.map(p => at(...p)).join(' '), style: colour}));
  }
  hover(step => lines.filter(({points}) => points.length).map(({points}) => {
    const [s, y] = points[nearest(points.map(p => p[0]), step)];
    return `${s}: ${number(y)}`;
  }).join('  '));
  return box;
}
function heat(name, last) { // of the first run that has it: steps to the right, the text downwards
  const {steps, metrics} = runs.find(run => run.metrics[name]);
  const kept = steps.filter((s, k) => Array.isArray(metrics[name][k]));
  const shown = kept.filter((s, i) => i % Math.ceil(kept.length / 60) === 0);
  const rows = shown.map(s => metrics[name][steps.indexOf(s)]), count = rows[0].length;
  const top = Math.max(...rows.flat().filter(x => x !== null));
  const part = k => name.includes('by_request') ? `≥${requested[k]}` : `${k + 1}/${count}`;
  const {box, picture, hover} = frame(name, 0, count, last, [part(0), part(count - 1)]);
  rows.forEach((row, i) => row.forEach((x, k) => x !== null && picture.append(svg('rect', {
    x: LEFT + W * (shown[i - 1] ?? 0) / last, y: TOP + H * k / count, height: H / count,
    width: W * (shown[i] - (shown[i - 1] ?? 0)) / last, 'fill-opacity': top > 0 ? Math.max(0, x / top) : 0}))));
  hover((step, y) => {
    const i = nearest(shown, step), k = Math.min(count - 1, Math.max(0, Math.floor(y * count)));
    return `${shown[i]}, ${part(k)}: ${number(rows[i][k])}`;
  });
  return box;
}
function curves() {
  const last = Math.max(1, ...runs.flatMap(run => run.steps)), families = {};
  for (const name of new Set(runs.flatMap(run => Object.keys(run.metrics)))) {
    const values = runs.flatMap(run => run.metrics[name] ?? []), parts = name.split('/');
    const drawn = values.some(Array.isArray) ? heat : values.some(x => typeof x === 'number') && curve;
    const family = parts.length < 2 ? 'training' : parts[0] === 'eval' ? parts.slice(0, -1).join('/') : parts[0];
    if (drawn) (families[family] ??= []).push(() => drawn(name, last));
  }
  const first = ['reward', 'eval/reward', 'training', 'length'].filter(family => families[family]);
  for (const family of new Set([...first, ...Object.keys(families)])) {
    const panels = families[family], box = make('div', '', {className: 'panels'});
    const details = fold(`${family}, ${panels.length}`, box);
    details.ontoggle = () => details.open && !box.firstChild && box.append(...panels.map(draw => draw()));
    details.open = family.endsWith('reward') || !$('curves').firstChild;
    $('curves').append(details);
  }
}

// ---------------------------------------------------------------------- the reader

function prose(text, copies, lang) { // copies and what was searched for marked
  const div = make('div', '', {className: 'text', lang}), hits = [], twins = new Map();
  const needle = $('needle').value.toLowerCase(), low = text.toLowerCase();
  for (let i = low.indexOf(needle); needle && i >= 0; i = low.indexOf(needle, i + needle.length)) {
    hits.push([i, i + needle.length]);
  }
  const cuts = [...new Set([0, text.length, ...copies.flat(), ...hits.flat()])].sort((a, b) => a - b);
  const inside = (spans, a) => spans.find(([from, to]) => from <= a && a < to);
  cuts.slice(0, -1).forEach((a, i) => {
    const copy = inside(copies, a), hit = inside(hits, a);
    const part = make(copy || hit ? 'mark' : 'span', text.slice(a, cuts[i + 1]));
    if (hit) part.className = 'hit';
    if (copy) {
      part.classList.add('copy');
      part.title = 'stands earlier in the text too: click to see where';
      part.onclick = () => {
        const twin = twins.get(copy[2]);
        twin.scrollIntoView({block: 'center'});
        twin.classList.add('twin');
      };
    }
    twins.set(a, part);
    div.append(part);
  });
  return div;
}
function strip(values, body) { // of a quantity along the tokens, from the top
  const top = Math.max(1e-9, ...values.filter(x => x !== null));
  const points = values.map((x, i) => `${(x ?? 0) / top},${i} ${(x ?? 0) / top},${i + 1}`);
  const picture = svg('svg', {class: 'strip', viewBox: `0 0 1 ${values.length}`, preserveAspectRatio: 'none'},
    svg('title', {}, `${$('quantity').value}, at most ${number(top)}; click to go there`),
    svg('polygon', {points: `0,0 ${points.join(' ')} 0,${values.length}`}));
  picture.onclick = event => {
    for (const details of body.querySelectorAll('details')) details.open = true;
    const {top, height} = picture.getBoundingClientRect();
    body.scrollTop = body.scrollHeight * (event.clientY - top) / height - body.clientHeight / 2;
  };
  return picture;
}
function fill(article, a, lang, judge) {
  const body = make('div', '', {className: 'body'}), row = make('div', '', {className: 'row'});
  const verdicts = a.verdicts.flatMap(([head, why]) => [make('dt', head), make('dd', why)]);
  if (a.think) body.append(fold('thinking', prose(a.think, [], lang)));
  if (verdicts.length) body.append(fold(`verdicts of ${judge}`, ...verdicts));
  if (a.answer) body.append(prose(a.answer, a.copies, lang));
  else body.append(make('p', 'no answer'), fold('what there is', prose(a.response, [], lang)));
  row.append(body);
  if (a.strip) row.append(strip(a.strip[$('quantity').value], body));
  article.append(row);
}
function pane(a, i) {
  const article = make('article'), {judges = []} = views[view], {language} = groups[record];
  article.append(make('i', '', {className: 'dot', style: `--c:var(--c${i % 8})`}), make('b', a.name));
  const signed = x => (x < 0 ? '' : '+') + x.toFixed(2);
  const rewards = Object.entries(a.rewards ?? {}).map(([name, [x, by]]) =>
    `${name} ${number(x)}` + (by === null ? '' : ` (${signed(by)})`));
  if (typeof a.advantage === 'number') rewards.unshift(`advantage ${signed(a.advantage)}`);
  article.append(...[a.facts, rewards.join(' · ')].filter(Boolean).map(x => make('p', x, {className: 'muted'})));
  if (!a.verdicts) return article;
  article.show = () => {
    article.show = null;
    fill(article, a, language, judges[i]);
  };
  if (i < 3) article.show();
  else seen.observe(article);
  return article;
}
const seen = new IntersectionObserver(entries => {
  for (const {isIntersecting, target} of entries) if (isIntersecting) target.show?.();
});
async function show(v, r, column) { // scrolls to a column that is given
  const now = ++turn, wanted = (v + views.length) % views.length;
  let found;
  try {
    found = await load(views[wanted]);
  } catch {
    $('facts').textContent = `${folder}/${views[wanted].key}.js is missing: run scripts.report again`;
    return;
  }
  if (now !== turn) return;
  if (groups !== found) {
    groups = found;
    $('record').replaceChildren(...groups.map(({id, heading, language}, value) =>
      make('option', `${id}  ${heading.slice(0, 90)}`, {value, lang: language})));
    $('lengths').replaceChildren(...scatter(wanted));
    $('quantity').hidden = !groups.some(group => group.samples.some(a => a.strip));
  }
  [view, record] = [wanted, (r + groups.length) % groups.length];
  const {id, query, language, facts, samples} = groups[record], {title, name} = views[view];
  [$('view').value, $('record').value] = [view, record];
  $('facts').textContent = [title, name, facts].filter(Boolean).join(' · ');
  Object.assign($('query'), {textContent: query, lang: language});
  $('elsewhere').replaceChildren(...views.flatMap(({title, name, prompts}, i) => {
    const there = i === view ? -1 : prompts?.indexOf(id) ?? -1;
    return there < 0 ? [] : [make('button', `${title} · ${name}`, {onclick: () => show(i, there)})];
  }));
  seen.disconnect();
  $('panes').replaceChildren(...samples.map(pane));
  $('panes').scrollLeft = 0;
  $('panes').children[column]?.scrollIntoView({block: 'nearest', inline: 'start'});
}
function scatter(v) { // words asked for against words written, both logarithmic; no answer is on the floor
  const dots = groups.flatMap(({required, samples, heading}, r) => samples.flatMap((a, i) =>
    required && a.verdicts ? [{required, words: a.words, heading, r, i}] : []));
  if (!dots.length) return [];
  const counts = dots.flatMap(d => [d.required, d.words]).filter(Boolean);
  const low = 0.8 * Math.max(10, Math.min(...counts)), high = 1.25 * Math.max(20, ...counts), size = 300;
  const place = x => Math.log(Math.max(x, low) / low) / Math.log(high / low) * size;
  const picture = svg('svg', {viewBox: `0 0 ${size + 56} ${size + 44}`, role: 'img'});
  for (const mark of [1, 2, 5].flatMap(m => [...Array(7).keys()].map(k => m * 10**k))) {
    if (mark < low || mark > high) continue;
    const x = 44 + place(mark), y = 8 + size - place(mark), name = mark < 1000 ? mark : `${mark / 1000}k`;
    picture.append(svg('polyline', {points: `${x},8 ${x},${8 + size}`}),
      svg('polyline', {points: `44,${y} ${44 + size},${y}`}),
      svg('text', {x, y: size + 23, 'text-anchor': 'middle'}, name),
      svg('text', {x: 38, y: y + 4, 'text-anchor': 'end'}, name));
  }
  picture.append(svg('polyline', {points: `44,${8 + size} ${44 + size},8`, 'stroke-dasharray': '3 4'}),
    svg('text', {x: 44 + size, y: size + 39, 'text-anchor': 'end'}, 'words asked for'),
    svg('text', {x: 49, y: 20}, 'words written'));
  for (const {required, words, heading, r, i} of dots) {
    const dot = svg('circle', {cx: 44 + place(required), cy: 8 + size - place(words), r: 3, 'data-at': `${r} ${i}`,
      style: `--c:var(--c${views[v].key ? 0 : i % 8})`}, svg('title', {},
      `asked for ${required.toLocaleString('en')}, wrote ${words.toLocaleString('en')}: ${heading.slice(0, 110)}`));
    dot.onclick = () => show(v, r, i);
    picture.append(dot);
  }
  return [picture];
}
function search() { // the next sample of the open view with the text, from the one on show
  const needle = $('needle').value.toLowerCase(), all = groups.flatMap((group, r) =>
    group.samples.flatMap((a, i) => (a.answer || a.response || '').toLowerCase().includes(needle) ? [[r, i]] : []));
  const [r, i] = all.find(([r]) => r > record) ?? all[0] ?? [record, 0];
  $('found').textContent = `${all.length} texts`;
  show(view, r, i);
}

const titles = {};
views.forEach(({title, name}, i) => {
  if (!titles[title]) $('view').append(titles[title] = make('optgroup', '', {label: title}));
  titles[title].append(make('option', name || title, {value: i}));
});
$('view').onchange = () => show(+$('view').value, 0);
$('record').onchange = () => show(view, +$('record').value);
$('quantity').onchange = () => show(view, record);
$('needle').onchange = search;
function move(step) {
  const next = record + step;
  if (next < 0 || next >= groups.length) show(view + step, step < 0 ? -1 : 0);
  else show(view, next);
}
$('back').onclick = () => move(-1);
$('next').onclick = () => move(1);
document.onkeydown = event => {
  const step = {ArrowLeft: -1, ArrowRight: 1}[event.key], {altKey, ctrlKey, metaKey, shiftKey, target} = event;
  if (!step || altKey || ctrlKey || metaKey || ['SELECT', 'INPUT'].includes(target.tagName)) return;
  event.preventDefault();
  if (shiftKey) show(view + step, record);
  else move(step);
};
if (runs.length) curves();
if (views.length) show(runs.length ? views.length - 1 : 0, 0);
else $('reader').hidden = true; // of a pretraining run, or before the first step
