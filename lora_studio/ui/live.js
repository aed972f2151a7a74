// The live view of the run whose id is props.value: asks server.poll for what is new and draws it.
// Everything a person or a model wrote goes into the page as textContent.
const plot = $('.plot'), slider = $('.scrub input'), log = $('.log');
const WORDS = { queued: 'waiting', running: 'running', paused: 'paused', done: 'done', stopped: 'stopped and kept',
  failed: 'failed', lost: 'broken off', missing: 'not found' };
const AXES = {  // of what the chart shows: its axis, and what its two lines are called
  train_loss: ['loss', 'train', 'train, smoothed'], grad_norm: ['gradient norm', 'gradient norm', 'smoothed'],
  learning_rate: ['learning rate', 'learning rate', 'scheduled'],
};
const DRAWN = 1500;  // points of a line
const EAGER = often(700), LIST_EVERY = 4000;

let run = null, drawn = null;  // drawn: the run the plot was made for
let seen, curve, extent, average, weight, evaluations, heldout, general, best, zoomed, follow, learned;
let state, asked, trouble, estimate, probe, findings;
let figure = 'train_loss', forgetting = false;  // what the chart shows
let runs = [], token = '', listed = 0;
let own = true, shared = false, visitors = false;  // whose run it is, and whether there is anybody else
let leaving = false;  // it has ended and is about to be deleted

// ---- figures in words --------------------------------------------------------------------------------------------

const loss = value => value == null ? '–' : value.toPrecision(value < 10 ? 3 : 4);
const percent = share => `${(100 * share).toFixed(0)} %`;
const plain = value => value >= 10000 ? `${(value / 1000).toFixed(1)}k` : value >= 100 ? value.toFixed(0) : value.toPrecision(3);
const size = bytes => bytes < 1e9 ? `${(bytes / 1e6).toFixed(0)} MB` : `${(bytes / 1e9).toFixed(1)} GB`;
const TILES = {
  train_loss: loss, heldout_loss: loss, accuracy: percent, tokens_per_s: plain, seconds_left: duration, memory_bytes: size,
  learning_rate: rate => rate.toExponential(1),
};

// ---- the curve ---------------------------------------------------------------------------------------------------

async function blank() {
  const axis = { gridcolor: colour('--border-color-primary'), zeroline: false, automargin: true };
  const line = colour('--chart-train'), measured = colour('--chart-heldout');
  const empty = { x: [], y: [] };
  const losses = figure === 'train_loss', [axis_, raw, even] = AXES[figure];
  drawn = run;
  plot.setAttribute('aria-label', `${losses ? 'Training and held-out loss' : axis_} by step`);
  const wide = plot.clientWidth >= 560;  // else the legend says no more than it must
  await Plotly.newPlot(plot, [
    { ...empty, name: raw, mode: 'lines', line: { width: 1, color: line }, opacity: .38, hoverinfo: 'skip', showlegend: wide },
    { ...empty, name: even, mode: 'lines', line: { width: 2.2, color: line } },
    { ...empty, name: 'held out', mode: 'lines+markers', cliponaxis: false, visible: losses,
      line: { width: 1.5, color: measured }, marker: { size: 6 } },
    { ...empty, name: 'kept', mode: 'markers', cliponaxis: false, hoverinfo: 'skip', visible: losses, showlegend: wide,
      marker: { size: 13, color: 'rgba(0,0,0,0)', line: { width: 2, color: measured } } },
    { ...empty, name: 'general text', mode: 'lines+markers', cliponaxis: false, visible: losses && forgetting,
      line: { width: 1.5, dash: 'dot', color: colour('--chart-general') }, marker: { size: 6, symbol: 'diamond' } },
  ], {
    uirevision: run, height: 300, margin: { l: 44, r: 8, t: 6, b: 38 }, hovermode: 'x unified',
    paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)',
    font: { color: colour('--body-text-color'), family: colour('--font'), size: 12 },
    hoverlabel: { bgcolor: colour('--background-fill-primary'), bordercolor: colour('--border-color-primary') },
    legend: { orientation: 'h', x: 1, xanchor: 'right', y: 1.01, yanchor: 'bottom' },
    xaxis: { ...axis, title: { text: 'step' }, rangemode: 'tozero' }, yaxis: { ...axis, title: { text: axis_ } },
  }, { responsive: true, displayModeBar: false, displaylogo: false });
  plot.on('plotly_relayout', change => {  // only what a person does; an update of ours does not raise it
    const moved = 'xaxis.range[0]' in change || 'xaxis.range' in change;
    if (!moved && !change['xaxis.autorange']) return;
    zoomed = moved;
    draw();
  });
}

function extended(values, steps) {  // a running mean that starts unbiased; a short run is remembered for less long
  const memory = Math.min(.9, Math.max(.5, 1 - 10 / steps));
  return values.map(value => {
    if (value == null) return null;
    average = memory * average + (1 - memory) * value;
    weight = memory * weight + 1 - memory;
    return average / weight;
  });
}

function extend(news) {  // the lines by what is new of them; whether anything is
  const [steps, values] = news.train;
  const even = figure === 'learning_rate' ? values : extended(values, news.steps || 100);
  steps.forEach((step, place) => curve.push([step, values[place], even[place]]));
  for (const [known, [at, measured]] of [[heldout, news.heldout], [general, news.general]])
    at.forEach((step, place) => known.set(step, measured[place]));
  if (news.saved.length) [best] = news.saved;
  if (news.steps) extent = [-.015 * news.steps, 1.01 * news.steps];
  $('.forgetting').hidden = figure !== 'train_loss' || !general.size;
  return steps.length || news.heldout[0].length || news.general[0].length || news.saved.length;
}

async function draw() {  // once for all lines, however long they are; a zoom stays
  const [raw, even] = inView(), marked = heldout.has(best) && figure === 'train_loss' ? [[best, heldout.get(best)]] : [];
  const lines = [raw, even, [...heldout], marked, [...general]];
  await Plotly.update(plot, {
    x: lines.map(points => points.map(point => point[0])), y: lines.map(points => points.map(point => point[1])),
  }, zoomed || !extent ? {} : { 'xaxis.range': extent }, [0, 1, 2, 3, 4]);
}

function inView() {  // [step, value] of the curve and of its smooth line, at most about DRAWN of each
  let first = 0, last = curve.length;
  if (zoomed) {
    const [from, to] = plot.layout.xaxis.range, after = curve.findIndex(([step]) => step > to);
    first = Math.max(0, curve.findIndex(([step]) => step >= from) - 1);
    if (after >= 0) last = after + 1;
  }
  const shown = curve.slice(first, last), size = Math.ceil(2 * shown.length / DRAWN);
  if (size < 2) return [shown, shown.map(([step, , even]) => [step, even])];
  const raw = [], even = [];
  for (let at = 0; at < shown.length; at += size) {  // of each few neighbours the lowest and the highest
    const few = shown.slice(at, at + size).filter(point => point[1] != null);
    if (!few.length) continue;
    const low = few.reduce((a, b) => b[1] < a[1] ? b : a), high = few.reduce((a, b) => b[1] > a[1] ? b : a);
    raw.push(...(low[0] < high[0] ? [low, high] : low === high ? [low] : [high, low]));
    even.push([few.at(-1)[0], few.at(-1)[2]]);
  }
  return [raw, even];
}

$('.switch').addEventListener('click', event => {
  const pressed = event.target.closest('button');
  if (pressed?.dataset.curve && pressed.dataset.curve !== figure) {
    figure = pressed.dataset.curve;
    for (const one of element.querySelectorAll('[data-curve]')) one.setAttribute('aria-pressed', one === pressed);
    seen = 0;
    forget();
    tick();
  } else if (pressed?.classList.contains('forgetting')) {
    forgetting = !forgetting;
    pressed.setAttribute('aria-pressed', forgetting);
    if (drawn) Plotly.restyle(plot, { visible: forgetting }, [4]);
  }
});

// ---- sample answers ----------------------------------------------------------------------------------------------

function part(kind, label, text, against = null) {  // against: the text from which what differs is marked
  const row = document.createElement('div'), name = document.createElement('span'), said = document.createElement('span');
  row.className = kind;
  name.textContent = label;
  if (!text || against == null) said.textContent = text || '(nothing)';
  else said.append(...marked(against, text));
  row.append(name, said);
  return row;
}

function answered() { return [...evaluations.keys()].sort((a, b) => a - b); }

function samples() {
  const steps = answered();
  $('.samples').hidden = !steps.length;
  if (!steps.length) return;
  slider.max = steps.length - 1;
  if (follow) slider.value = steps.length - 1;
  const step = steps[slider.value], now = evaluations.get(step), base = evaluations.get(steps[0]);
  $('.scrub output').textContent = step === 0 ? 'base model' : `step ${step}`;
  slider.setAttribute('aria-valuetext', $('.scrub output').textContent);
  $('.samples .rows').replaceChildren(...[...now.keys()].sort((a, b) => a - b).map(index => {
    const sample = now.get(index), card = document.createElement('article');
    const said = sample.text.trim(), label = said.replace(/ \([01]\.\d\d\)$/, '');  // a label comes with its chance
    const hit = [said, label].includes(sample.target.trim());
    card.append(part('asked', 'Prompt', sample.prompt), part('wanted', 'Wanted', sample.target));
    if (base.has(index)) card.append(part('before', 'Base', base.get(index).text));
    if (step !== steps[0]) card.append(part(
      hit ? 'after hit' : 'after', hit ? `Step ${step} ✓` : `Step ${step}`, sample.text, base.get(index)?.text));
    return card;
  }));
}

function scrub(to) { slider.value = to; follow = slider.value === slider.max; samples(); }
slider.addEventListener('input', () => scrub(slider.value));
$('.back').addEventListener('click', () => scrub(+slider.value - 1));
$('.on').addEventListener('click', () => scrub(+slider.value + 1));

// ---- state, result, run list -------------------------------------------------------------------------------------

function figures(news) {
  const active = ACTIVE.includes(news.state);
  const share = news.state === 'done' ? 100  // patience may end a run before its last step
    : news.steps ? Math.round(100 * news.step / news.steps) : 0;
  if (news.state !== state) trouble = '';
  state = news.state;
  element.dataset.state = state;
  element.dataset.points = curve.length;
  element.dataset.run = run;
  [own, shared, visitors] = [news.own, news.shared, news.visitors];
  $('.pace').hidden = $('.tiles').hidden = news.brought;  // it has not trained here
  $('.log').hidden = !own;
  $('.state').textContent = WORDS[state] || state;
  $('.state').dataset.state = state;
  $('.bar i').style.width = `${share}%`;
  $('.bar').setAttribute('aria-valuenow', share);
  leaving = news.discarded;
  if (!active && asked !== 'again') asked = leaving ? 'discard' : '';
  buttons(own && !leaving ? { pause: state === 'running', stop: active, discard: active, resume: !active && news.resumable,
    share: visitors, delete: !active } : {});
  $('[data-ask=share]').setAttribute('aria-pressed', shared);
  $('.safe').hidden = !active || !own;
  $('[data-tile=step]').textContent = `${news.step}/${news.steps || '?'}`;
  for (const name in TILES) {
    const value = name === 'seconds_left' && !active ? null : news.latest[name];
    $(`[data-tile=${name}]`).textContent = value == null ? '–' : TILES[name](value);
  }
  $('[data-tile=accuracy]').parentElement.hidden = news.latest.accuracy == null;  // only where labels are chosen
  const ahead = runs.filter(one => ACTIVE.includes(one.state)).length - 1;
  const others = ahead > 0 ? 'Another run is training; this one starts when it has ended.' : visitors ? 'Next in the queue.' : '';
  const queue = state !== 'queued' ? '' : news.place > 1 ? `Number ${news.place} in the queue.` : others;
  const waiting = queue || (state === 'queued' ? 'Starting a worker.' : news.note || (seen ? '' : 'The worker is loading its libraries.'));
  const told = (findings || []).some(one => one.message === waiting);  // it stands in a card already
  say($('.note'), trouble || ASKED[asked] || (active && !told ? waiting : ''));
  if (news.probe.length) [probe] = news.probe;
  forecast(active);
  ended(news, active || leaving);
  advise(news.findings || findings, active);
}

const ASKED = { stop: 'Stopping after the current step; the adapter is kept.',
  discard: 'Stopping after the current step, to be deleted.',
  pause: 'Pausing after the current step; it can be resumed from there.', resume: 'Going back into the queue.',
  again: 'Starting again.' };

const ENDS = ['pause', 'stop', 'discard'];  // who asked for one may still ask for one behind it
function may(wanted) { return !asked || (ENDS.includes(asked) && ENDS.indexOf(wanted) > ENDS.indexOf(asked)); }

function buttons(shown) {  // where the one with the focus goes, the next one takes it
  const all = [...element.querySelectorAll('[data-ask]')], focused = all.find(one => one === document.activeElement);
  for (const one of all) { one.hidden = !shown[one.dataset.ask]; one.setAttribute('aria-disabled', !may(one.dataset.ask)); }
  if (focused?.hidden) all.find(one => !one.hidden)?.focus();
}

function forecast(active) {
  const { seconds, memory_bytes: memory } = probe || estimate, parts = [];
  if (memory) parts.push(size(memory));
  if (seconds) parts.push(`about ${duration(seconds)} in all`);
  if (probe?.batch_fits) parts.push(`${probe.batch_fits} ${probe.batch_fits === 1 ? 'example' : 'examples'} at a time fit`);
  if (probe?.accumulate > 1) parts.push(`a step is ${probe.accumulate} parts`);
  const how = probe ? 'Measured on the heaviest batch' : 'Estimated';
  say($('.forecast'), active && parts.length ? `${how}: ${parts.join(', ')}.` : '');
}

function costs(news, found) {  // what was said before and what it was, side by side
  const exact = seconds => seconds < 600 ? `${Math.round(seconds)} s` : duration(seconds);
  const rows = [
    ['Memory', size, estimate.memory_bytes, found.probe_memory_bytes, found.memory_bytes],
    ['Time', exact, estimate.seconds, found.probe_seconds, found.seconds],
  ];
  $('.costs tbody').replaceChildren(...rows.map(([name, words, ...figures]) => {
    const row = document.createElement('tr'), head = document.createElement('th');
    head.scope = 'row';
    head.textContent = name;
    row.append(head, ...figures.map((figure, place) => {
      const cell = document.createElement('td');
      cell.textContent = figure == null ? '–' : words(figure);
      if (place === 2 && figure != null && name === 'Time' && news.step < news.steps)
        cell.textContent += ` for ${news.step} of ${news.steps} steps`;
      return cell;
    }));
    return row;
  }));
}

function advise(fresh, active) {  // one card a finding; the error has its own place
  const mark = JSON.stringify([fresh, active]);
  if (!fresh || $('.findings').dataset.mark === mark) return;
  findings = fresh;
  $('.findings').dataset.mark = mark;
  $('.findings').hidden = !fresh.length;
  $('.findings').replaceChildren(...fresh.map(one => {
    const card = document.createElement('article'), text = document.createElement('p'), hint = document.createElement('span');
    text.textContent = `${one.message} `;
    hint.textContent = one.hint;
    text.append(hint);
    card.append(text);
    card.className = { E: 'bad', I: 'plain' }[one.code[0]] || '';
    if (one.again) {
      const again = document.createElement('button');
      again.type = 'button';
      again.dataset.code = one.code;
      again.textContent = `Start again with ${one.again}`;
      if (active) again.title = 'This run is stopped; what it has learnt is kept';
      card.append(again);
    }
    return card;
  }));
}

function ended(news, active) {
  const found = news.summary || {}, words = [];
  if (found.base_loss != null && found.best_loss != null)
    words.push(`Held-out loss ${loss(found.base_loss)} → ${loss(found.best_loss)}`);
  if (found.base_accuracy != null && found.best_accuracy != null)
    words.push(`accuracy ${percent(found.base_accuracy)} → ${percent(found.best_accuracy)}`);
  if (found.best_step) words.push(`best at step ${found.best_step}`);
  if (found.seconds) words.push(duration(found.seconds));
  $('.result').hidden = active || !(news.adapter || learned);  // of a shared run there are figures alone
  $('.result .figures').textContent = words.join(' · ') || (news.brought ? 'Made elsewhere and brought along' : 'The best adapter so far is kept');
  $('.result .next').hidden = !own;
  if (!active) card();
  const known = { memory_bytes: news.latest.memory_bytes, probe_memory_bytes: probe?.memory_bytes, probe_seconds: probe?.seconds, ...found };
  $('.costs').hidden = active || known.memory_bytes == null;
  if (!$('.costs').hidden) costs(news, known);
}

const SCORES = { accuracy: 'Accuracy', exact_match: 'Exact match', rouge_l: 'ROUGE-L', bleu: 'BLEU' };

function card() {  // did it learn?
  const made = JSON.stringify([run, learned?.step, learned?.sentence]);
  if ($('.result').dataset.made === made) return;
  $('.result').dataset.made = made;
  $('.result').dataset.verdict = learned?.verdict || '';
  say($('.verdict'), learned?.sentence);
  say($('.advice'), learned?.advice);
  $('.score').replaceChildren(...(learned ? measures() : []));
  $('.score').hidden = !$('.score').childElementCount;
  $('.ranks').replaceChildren(...(learned?.ranks || []).map((rank, place) => {
    const button = document.createElement('button'), more = place === learned.ranks.length - 1;
    button.type = 'button';
    button.dataset.more = more;
    button.textContent = `Try rank ${rank}`;
    button.title = `A new run with the same settings and ${more ? 'twice' : 'half'} the rank; it waits in the queue`;
    return button;
  }));
  const groups = [['heldout', 'Rows it never saw'], ['train', 'Rows it trained on']].map(([part, title]) => [
    title, (learned?.rows || []).filter(row => row.part === part)]).filter(([, rows]) => rows.length);
  $('.shown').replaceChildren(...groups.map(([title, rows], place) => {
    const folded = document.createElement('details'), head = document.createElement('summary');
    folded.open = place === 0;
    head.textContent = `${title}: ${rows.length} before and after`;
    folded.append(head, ...rows.map(beforeAndAfter));
    return folded;
  }));
  $('.shown').hidden = !groups.length;
}

function measures() {  // the task's figure as two bars, and what became of the general text
  const { metric, losses } = learned, made = [];
  if (metric) {
    const [low, high] = metric.interval === 'Wilson' ? [metric.low, metric.high]
      : [metric.base + metric.low, metric.base + metric.high];
    made.push(bar('Base', metric.base), bar('Adapted', metric.adapted, low, high));
    const rows = `${metric.rows} held-out row${metric.rows === 1 ? '' : 's'}`;
    const sure = metric.interval === 'Wilson' ? `${percent(low)} to ${percent(high)} (Wilson)`
      : `of the difference ${percent(metric.low)} to ${percent(metric.high)} (paired bootstrap)`;
    made.unshift(line(term(SCORES[metric.name]), ` on ${rows}; `, term('95 % interval'), ` ${sure}`));
  }
  if (losses.general) {
    const [before, after] = losses.general, moved = 100 * (after / before - 1);
    const word = moved >= 10 ? 'It forgot' : moved >= 2 ? 'It forgot a little' : 'Little or nothing was forgotten';
    made.push(line(`${word}: `, term('loss on general text', 'forgetting'), ` ${loss(before)} → ${loss(after)}`));
  }
  return made;
}

function line(...parts) {
  const made = document.createElement('p');
  made.append(...parts);
  return made;
}

function term(text, key = text.toLowerCase()) {  // a word that explains itself: terms.py
  const made = document.createElement('span');
  made.className = 'term';
  made.tabIndex = 0;
  made.dataset.term = key;
  made.textContent = text;
  return made;
}

function bar(name, value, low = null, high = null) {
  const row = document.createElement('div'), label = document.createElement('span');
  const rail = document.createElement('div'), fill = document.createElement('i'), figure = document.createElement('b');
  label.textContent = name;
  figure.textContent = percent(value);
  fill.style.width = `${100 * value}%`;
  rail.append(fill);
  if (low != null) {
    const range = document.createElement('u');  // from the low to the high end of the interval
    range.style.left = `${100 * Math.max(0, low)}%`;
    range.style.width = `${100 * (Math.min(1, high) - Math.max(0, low))}%`;
    rail.append(range);
  }
  row.append(label, rail, figure);
  return row;
}

function folded(row, text) {  // a long text shows its first lines, and a button for the rest
  if (text.length < 320 && text.split('\n').length < 5) return row;
  const more = document.createElement('button');
  const turn = whole => {
    row.classList.toggle('short', !whole);
    more.textContent = whole ? 'Show less' : 'Show all';
  };
  more.type = 'button';
  more.addEventListener('click', () => turn(row.classList.contains('short')));
  row.append(more);
  turn(false);
  return row;
}

function beforeAndAfter(row) {
  const made = document.createElement('article'), hit = row.adapted != null && row.adapted.trim() === row.target.trim();
  if (row.prompt) made.append(part('asked', 'Prompt', row.prompt));
  made.append(part('wanted', row.prompt ? 'Wanted' : 'Text', row.target));
  if (row.base != null) made.append(folded(part('before', 'Base', row.base), row.base));
  if (row.adapted != null)
    made.append(folded(part(hit ? 'after hit' : 'after', hit ? 'Adapted ✓' : 'Adapted', row.adapted, row.base), row.adapted));
  if (row.base_loss != null && row.loss != null) {
    const [before, after] = [row.base_loss, row.loss].map(loss), moved = Math.round(100 * (row.loss / row.base_loss - 1));
    made.append(part('drop', 'Loss', `${before} → ${after} (${moved > 0 ? '+' : ''}${moved} %)`));
  }
  return made;
}

function about(run) {
  if (run.state === 'running') return `step ${run.step} of ${run.steps}`;
  const said = [run.verdict, run.loss == null ? '' : `held-out loss ${loss(run.loss)}`].filter(Boolean);
  if (run.state === 'done' && said.length) return said.join(' · ');
  return run.reason || WORDS[run.state];
}

function progress(id, step, steps) {
  const row = runs.find(one => one.id === id);
  if (!row || row.step === step) return;
  [row.step, row.steps] = [step, steps];
  $(`[data-pick="${id}"] span`).textContent = about(row);
}

function list() {
  $('section.runs').hidden = !runs.length;
  const focused = document.activeElement?.dataset?.pick;
  $('nav').replaceChildren(...runs.map(one => {
    const made = document.createElement('button'), dot = document.createElement('i');
    const name = document.createElement('b'), line = document.createElement('span');
    made.type = 'button';
    made.dataset.pick = one.id;
    made.dataset.state = one.state;
    made.setAttribute('aria-current', one.id === run);
    name.textContent = one.name;
    line.textContent = about(one);
    made.title = `${one.name}: ${WORDS[one.state]}. ${one.reason || ''}`;
    made.append(dot, name, line);
    return made;
  }));
  if (focused) $(`[data-pick="${focused}"]`)?.focus();
}

$('nav').addEventListener('click', event => {
  const picked = event.target.closest('button')?.dataset.pick;
  if (picked) { props.value = picked; start(); }
});
$('.compare').addEventListener('click', () => trigger('compare'));
$('.report').addEventListener('click', event => {
  event.target.textContent = 'Making it';  // report_card.MADE is called when it is there
  trigger('report');
});
$('.export').addEventListener('click', () => trigger('export'));
$('.ranks').addEventListener('click', event => {
  const pressed = event.target.closest('button');
  if (pressed) anew(() => server.another({ run, more: pressed.dataset.more === 'true' }));
});
$('.controls').addEventListener('click', async event => {
  const pressed = event.target.closest('button'), wanted = pressed?.dataset.ask, whose = run;
  if (!wanted || !may(wanted)) return;
  [asked, trouble] = [wanted, ''];
  say($('.note'), ASKED[asked]);
  const { problem } = await done(() => server[wanted]({ run: whose, on: !shared }));
  if (whose !== run || (asked && asked !== wanted)) return;
  trouble = problem;
  if (problem || ['resume', 'share', 'delete', 'restore'].includes(wanted)) asked = '';
  if (wanted === 'delete' || wanted === 'restore') listed = 0;
  tick();
});
$('.findings').addEventListener('click', event => {
  const again = event.target.closest('button');
  if (again) anew(() => server.restart({ run, code: again.dataset.code }));
});
async function anew(act) {  // start a run that comes of this one, and show it
  const whose = run;
  if (asked) return;
  [asked, trouble] = ['again', ''];
  say($('.note'), ASKED.again);
  const { problem, run: fresh } = await done(act);
  if (whose !== run) return;
  [asked, trouble] = ['', problem];
  if (problem) return tick();
  props.value = fresh;
  start();
  $('.name').focus();  // the button is gone
}
log.addEventListener('toggle', () => tick());

// ---- asking ------------------------------------------------------------------------------------------------------

function forget() {  // all that was drawn: an attempt that was resumed says some of it anew
  [curve, extent, average, weight, drawn, probe] = [[], null, 0, 0, null, null];
  [evaluations, heldout, general, best, zoomed, learned] = [new Map(), new Map(), new Map(), null, false, null];
  $('.samples').hidden = true;
}

function gone(news) {
  if (state !== news.state) { renew(); list(); }
  element.dataset.state = state = news.state;
  const back = state === 'deleted';
  $('.name').textContent = back ? `${news.name} is deleted` : 'This run is not here';
  $('.line').textContent = back ? `It can be brought back for ${Math.ceil(news.left_s)} s more.`
    : 'It was deleted, or belongs to another app or visitor.';
  asked = '';
  buttons({ restore: back });
  say($('.note'), trouble);
}

async function take(news) {
  if (news.runs) {
    [runs, token] = [news.runs, news.token];
    say($('.more'), news.more ? `${news.more.toLocaleString('en')} more under Runs.` : '');
    list();
  }
  for (const { id, step, steps } of news.active || []) progress(id, step, steps);
  if (news.run !== run || news.start !== seen || news.curve !== figure || !run) return;  // to an older question
  if (news.state === 'missing' || news.state === 'deleted') return gone(news);
  if (state === 'deleted') renew();  // it is back
  if (news.whole) forget();
  seen = news.next;  // and all that is new is taken in before anything is waited for: a click may come meanwhile
  if (news.about) {
    $('.name').textContent = news.about.name;
    $('.line').textContent = news.about.line;
    estimate = news.about.estimate;
  }
  for (const sample of news.samples) {
    if (!evaluations.has(sample.step)) evaluations.set(sample.step, new Map());
    evaluations.get(sample.step).set(sample.index, sample);
  }
  if (news.learned) learned = news.learned;
  if (extend(news)) {
    plot.hidden = $('.switch').hidden = false;
    if (drawn !== run) await blank();
    await draw();
    if (news.run !== run || news.curve !== figure) return;
  }
  if (news.samples.length) samples();
  if (news.state !== state) listed = 0;  // the list shows another state, too
  figures(news);
  progress(run, news.step, news.steps);
  if (news.log != null) $('.log pre').textContent = news.log;
}

const tick = asking(async () => {
  const fresh = Date.now() - listed > LIST_EVERY;
  const news = await server.poll({ run: run || '', start: seen, curve: figure, list: fresh, known: token, log: log.open });
  if (fresh) listed = Date.now();
  await take(news);
  return !listed || leaving || state === 'deleted' || ACTIVE.includes(state) || runs.some(one => ACTIVE.includes(one.state)) ? EAGER : IDLE;
});

function address() {
  const url = new URL(location);
  run ? url.searchParams.set('run', run) : url.searchParams.delete('run');
  history.replaceState(history.state, '', url);
}

function renew() {  // nothing is known or drawn of the run
  [seen, follow, state, listed, asked, trouble, estimate, findings] = [0, true, '', 0, '', '', {}, null];
  forget();
  delete element.dataset.state;
  delete $('.findings').dataset.mark;
  element.dataset.points = 0;
  for (const part of ['.result', '.findings', '.costs', '.pace', '.tiles', '.log', '.safe', '.forecast', '.note'])
    $(part).hidden = true;
  plot.hidden = $('.switch').hidden = true;
  delete $('.result').dataset.made;
}

function start() {
  const wanted = props.value || '';
  if (wanted !== run) {
    run = wanted;
    renew();
    if (run) address();
    list();
  }
  tick();
}

watch('value', () => {
  start();
  if (innerWidth < 800 && element.offsetParent) element.scrollIntoView({ block: 'start' });  // it lies under the form
});
new IntersectionObserver(entries => {
  if (!entries.some(entry => entry.isIntersecting)) return;
  if (drawn) Plotly.Plots.resize(plot);
  tick();
}).observe(element);
start();
