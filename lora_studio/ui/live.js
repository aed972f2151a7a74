// The live view of the run whose id is props.value: asks server.poll for what is new and draws it.
// Everything a person or a model wrote goes into the page as textContent.
const plot = $('.plot'), slider = $('.scrub input'), log = $('.log');
const WORDS = { queued: 'waiting', running: 'running', paused: 'paused', done: 'done', stopped: 'stopped and kept',
  failed: 'failed', lost: 'broken off', missing: 'not found' };
const EAGER = often(700), LIST_EVERY = 4000;

let run = null, drawn = null;  // drawn: the run the plot was made for
let seen, points, average, weight, evaluations, heldout, follow, state, asked, trouble, estimate, probe, findings;
let runs = [], token = '', listed = 0;
let own = true, shared = false, visitors = false;  // whose run it is, and whether there is anybody else

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
  drawn = run;
  await Plotly.newPlot(plot, [
    { ...empty, name: 'train', mode: 'lines', line: { width: 1, color: line }, opacity: .38, hoverinfo: 'skip' },
    { ...empty, name: 'train, smoothed', mode: 'lines', line: { width: 2.2, color: line } },
    { ...empty, name: 'held out', mode: 'lines+markers', cliponaxis: false,
      line: { width: 1.5, color: measured }, marker: { size: 6 } },
    { ...empty, name: 'kept', mode: 'markers', cliponaxis: false, hoverinfo: 'skip',
      marker: { size: 13, color: 'rgba(0,0,0,0)', line: { width: 2, color: measured } } },
  ], {
    uirevision: run, height: 300, margin: { l: 44, r: 8, t: 6, b: 38 }, hovermode: 'x unified',
    paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)',
    font: { color: colour('--body-text-color'), family: colour('--font'), size: 12 },
    hoverlabel: { bgcolor: colour('--background-fill-primary'), bordercolor: colour('--border-color-primary') },
    legend: { orientation: 'h', x: 1, xanchor: 'right', y: 1.01, yanchor: 'bottom' },
    xaxis: { ...axis, title: { text: 'step' }, rangemode: 'tozero' }, yaxis: { ...axis, title: { text: 'loss' } },
  }, { responsive: true, displayModeBar: false, displaylogo: false });
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

async function extend(news) {
  const [steps, losses] = news.train, [at, measured] = news.heldout;
  if (steps.length || at.length) {
    await Plotly.extendTraces(plot, { x: [steps, steps, at], y: [losses, extended(losses, news.steps || 100), measured] }, [0, 1, 2]);
    points += steps.length;
    at.forEach((step, place) => heldout.set(step, measured[place]));
  }
  if (news.saved.length) {
    const [best] = news.saved, height = heldout.get(best);
    if (height != null) await Plotly.restyle(plot, { x: [[best]], y: [[height]] }, [3]);
  }
  if (news.steps && plot.layout.xaxis.autorange !== false) {
    await Plotly.relayout(plot, { 'xaxis.range': [-.015 * news.steps, 1.01 * news.steps] });
  }
}

// ---- sample answers ----------------------------------------------------------------------------------------------

function part(kind, label, text) {
  const row = document.createElement('div'), name = document.createElement('span'), said = document.createElement('span');
  row.className = kind;
  name.textContent = label;
  said.textContent = text || '(nothing)';
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
    if (step !== steps[0]) card.append(part(hit ? 'after hit' : 'after', hit ? `Step ${step} ✓` : `Step ${step}`, sample.text));
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
  element.dataset.points = points;
  element.dataset.run = run;
  [own, shared, visitors] = [news.own, news.shared, news.visitors];
  $('.pace').hidden = $('.tiles').hidden = news.brought;  // it has not trained here
  $('.log').hidden = !own;
  $('.state').textContent = WORDS[state] || state;
  $('.state').dataset.state = state;
  $('.bar i').style.width = `${share}%`;
  $('.bar').setAttribute('aria-valuenow', share);
  if (!active && asked !== 'again') asked = '';
  buttons(own ? { pause: state === 'running', stop: active, resume: !active && news.resumable,
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
  ended(news, active);
  advise(news.findings || findings, active);
}

const ASKED = { stop: 'Stopping after the current step; the adapter is kept.',
  pause: 'Pausing after the current step; it can be resumed from there.', resume: 'Going back into the queue.',
  again: 'Starting again.' };

function may(wanted) { return !asked || (asked === 'pause' && wanted === 'stop'); }  // who paused may still stop

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
  if (probe?.accumulate > 1) parts.push(`a step is ${probe.accumulate} passes`);
  const how = probe ? 'Measured on the longest batch' : 'Estimated';
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
  $('.result').hidden = active || !news.adapter;
  $('.result span').textContent = words.join(' · ') || (news.brought ? 'Made elsewhere and brought along' : 'The best adapter so far is kept');
  const known = { memory_bytes: news.latest.memory_bytes, probe_memory_bytes: probe?.memory_bytes, probe_seconds: probe?.seconds, ...found };
  $('.costs').hidden = active || known.memory_bytes == null;
  if (!$('.costs').hidden) costs(news, known);
}

function about(run) {
  if (run.state === 'running') return `step ${run.step} of ${run.steps}`;
  if (run.state === 'done' && run.loss != null) return `held-out loss ${loss(run.loss)}`;
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
$('.findings').addEventListener('click', async event => {
  const again = event.target.closest('button'), whose = run;
  if (!again || asked) return;
  [asked, trouble] = ['again', ''];
  say($('.note'), ASKED.again);
  const { problem, run: fresh } = await done(() => server.restart({ run: whose, code: again.dataset.code }));
  if (whose !== run) return;
  [asked, trouble] = ['', problem];
  if (problem) return tick();
  props.value = fresh;
  start();
  $('.name').focus();  // the button is gone
});
log.addEventListener('toggle', () => tick());

// ---- asking ------------------------------------------------------------------------------------------------------

function forget() {  // all that was drawn: an attempt that was resumed says some of it anew
  [points, average, weight, drawn, probe] = [0, 0, 0, null, null];
  [evaluations, heldout] = [new Map(), new Map()];
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
  if (news.runs) { runs = news.runs; token = news.token; list(); }
  for (const { id, step, steps } of news.active || []) progress(id, step, steps);
  if (news.run !== run || news.start !== seen || !run) return;  // an answer to an older question
  if (news.state === 'missing' || news.state === 'deleted') return gone(news);
  if (state === 'deleted') renew();  // it is back
  if (news.whole) forget();
  if (news.about) {
    $('.name').textContent = news.about.name;
    $('.line').textContent = news.about.line;
    estimate = news.about.estimate;
  }
  if (news.train[0].length || news.heldout[0].length) {
    plot.hidden = false;
  }
  if (!plot.hidden && drawn !== run) await blank();
  if (drawn === run) await extend(news);
  for (const sample of news.samples) {
    if (!evaluations.has(sample.step)) evaluations.set(sample.step, new Map());
    evaluations.get(sample.step).set(sample.index, sample);
  }
  seen = news.next;
  if (news.samples.length) samples();
  if (news.state !== state) listed = 0;  // the list shows another state, too
  figures(news);
  progress(run, news.step, news.steps);
  if (news.log != null) $('.log pre').textContent = news.log;
}

const tick = asking(async () => {
  const fresh = Date.now() - listed > LIST_EVERY;
  const news = await server.poll({ run: run || '', start: seen, list: fresh, known: token, log: log.open });
  if (fresh) listed = Date.now();
  await take(news);
  return !listed || state === 'deleted' || ACTIVE.includes(state) || runs.some(one => ACTIVE.includes(one.state)) ? EAGER : IDLE;
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
  plot.hidden = true;
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
