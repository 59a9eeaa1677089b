'use strict';
const $ = id => document.getElementById(id), picked = [0, 1];
const all = JSON.parse($('data').textContent).flatMap((section, s) =>
  section.records.map((record, r) => ({...section, ...record, s, r})));
let now = 0;

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
  if (!step || altKey || ctrlKey || metaKey || target.tagName === 'SELECT') return;
  event.preventDefault();
  show(now + step);
};
for (const path of document.querySelectorAll('[data-at]')) path.onclick = () => {
  const [s, r, column] = path.dataset.at.split(' ').map(Number);
  if (picked[1] === column) picked[1] = picked[0];
  picked[0] = column;
  show(all.findIndex(x => x.s === s && x.r === r));
  $('reader').scrollIntoView();
};
if (all.length) show(0);
