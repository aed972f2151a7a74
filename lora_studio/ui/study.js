// The race and the table of the study whose id is props.value, or of the newest one: asks server.poll for what is new.
// Everything a person wrote goes into the page as textContent.
const plot = $('.plot'), sizes = $('.sizes .figure'), choice = $('.studies');
const OVER = ['done', 'stopped', 'failed'];  // what is paused or lost is neither
const WORDS = { queued: 'waiting', running: 'running', paused: 'paused', done: 'done', stopped: 'dropped', failed: 'failed',
  lost: 'broken off' };
const EAGER = often(900);

let asked = null, study = '';
let token, told, seen, curves, runs, picked, state, dropping;  // curves: points by run; runs: newest answer by run
let view = 'both', log = false, strong = null;  // strong: the run whose lines stand out

function forget() {
  [token, told, picked, state, strong] = ['', null, null, '', null];
  [seen, curves, runs, dropping] = [{}, new Map(), new Map(), new Set()];
}

// ---- words -------------------------------------------------------------------------------------------------------

const loss = value => value == null ? '–' : value >= .1 ? value.toFixed(3) : value.toPrecision(3);
const rate = value => value.toExponential(1).replace('.0e', 'e');
const big = value => value.toLocaleString('en');

function button(text, does, run) {
  const one = made('button', text);
  one.type = 'button';
  one.dataset.does = does;
  one.dataset.run = run;
  return one;
}

const cells = () => told.rows.flatMap(row => row.cells.flatMap(cell => cell ? [cell, ...cell.others] : []));
const find = run => cells().find(cell => cell.run === run);
function place(cell) {
  const row = told.rows.find(one => one.targets.join() === cell.targets.join());
  return `${row.name}, rank ${cell.rank}${told.rates.length > 1 ? `, rate ${rate(cell.rate)}` : ''}`;
}
function newest(cell) {  // the final loss, or the last one measured behind the base model's
  const [steps, values] = curves.get(cell.run)?.heldout || [[], []];
  return cell.loss ?? (steps.length && steps.at(-1) ? values.at(-1) : null);
}
function standing(run) {  // how a run stands, from the newest answer
  const { state, step, steps } = runs.get(run) || {};
  if (state === 'running') return step ? `step ${step}/${steps}` : 'starting';
  return state === 'stopped' ? `dropped at ${step}` : WORDS[state] || '';
}

// ---- the race ----------------------------------------------------------------------------------------------------

function traces() {
  const all = cells(), listed = plot.clientWidth >= 560 && all.length <= 12;  // else the table is the legend
  return all.flatMap(cell => {
    const own = curves.get(cell.run) || { train: [[], []], heldout: [[], []] };
    const { colour, symbol, dash } = told.colours[cell.run], faint = strong && strong !== cell.run ? .15 : 1;
    const about = { name: place(cell), legendgroup: cell.run, cliponaxis: false,
      hovertemplate: '%{y:.4g} at step %{x}<extra>%{fullData.name}</extra>' };
    const thick = strong === cell.run ? 1.5 : 0;
    return [
      { ...about, x: own.train[0], y: smooth(own.train[1]), mode: 'lines', visible: view !== 'heldout', opacity: faint * (view === 'both' ? .4 : 1),
        line: { color: colour, dash, width: (view === 'both' ? 1.2 : 2) + thick }, showlegend: view === 'train' && listed },
      { ...about, x: own.heldout[0], y: own.heldout[1], mode: 'lines+markers', visible: view !== 'train', opacity: faint,
        line: { color: colour, dash, width: 2 + thick }, marker: { size: 7, symbol }, showlegend: view !== 'train' && listed },
    ];
  });
}

function axes() {
  const most = Math.max(1, ...[...runs.values()].map(run => run.steps)), bare = chart(340, 'step', 'loss');
  return {
    ...bare, uirevision: `${study}${log}${most}`, hovermode: 'closest',
    xaxis: { ...bare.xaxis, range: [-.015 * most, 1.01 * most] },
    yaxis: { ...bare.yaxis, type: log ? 'log' : 'linear', ...(log ? { dtick: 'D2' } : {}) },
  };
}

async function race() {
  const some = [...curves.values()].some(one => one.train[0].length || one.heldout[0].length);
  $('.race').hidden = !some;
  if (some) await Plotly.react(plot, traces(), axes(), BARE);
}

async function against(figure) {
  const some = figure.data.some(one => one.x?.length);
  $('.sizes').hidden = !some;
  if (!some) return;
  const { font, hoverlabel } = chart();
  const layout = { ...figure.layout, font: { ...figure.layout.font, color: font.color, family: font.family }, hoverlabel };
  await Plotly.react(sizes, figure.data, layout, BARE);
}

$('.race').addEventListener('click', event => {
  const pressed = event.target.closest('button');
  if (!pressed) return;
  if (pressed.dataset.view) view = pressed.dataset.view;
  else log = !log;
  for (const one of element.querySelectorAll('[data-view]')) one.setAttribute('aria-pressed', one.dataset.view === view);
  $('[data-log]').setAttribute('aria-pressed', log);
  race();
});

// ---- the table ---------------------------------------------------------------------------------------------------

function entry(cell) {
  const box = made('td'), shown = button(null, 'pick', cell.run), status = runs.get(cell.run)?.state || cell.status;
  const { colour } = told.colours[cell.run], line = made('span', null, 'line-of'), dot = made('i');
  shown.className = 'cell';
  dot.style.background = colour;
  line.append(dot, made('b', loss(newest(cell))));
  if (cell.budget) line.append(made('small', cell.budget, 'letter'));
  shown.append(line);
  if (cell.accuracy != null) shown.append(made('span', `accuracy ${Math.round(100 * cell.accuracy)} %`));
  shown.append(made('span', `${big(cell.parameters)} params`));
  if (status !== 'done') shown.append(made('span', standing(cell.run), `standing ${status}`));
  const best = cell.run === told.best && !told.unfinished, mark = cell.run === told.front;
  if (mark) shown.append(made('em', told.unfinished ? 'leads' : 'recommended'));
  else if (best) shown.append(made('span', 'lowest loss', 'lowest'));
  shown.setAttribute('aria-pressed', cell.run === picked);
  shown.setAttribute('aria-label', `${place(cell)}: held-out loss ${loss(cell.loss)}, ${big(cell.parameters)} parameters`
    + `${cell.budget ? `, budget ${cell.budget}` : ''}, ${WORDS[status]}${mark ? told.unfinished ? ', leads' : ', recommended' : ''}`);
  box.classList.toggle('chosen', mark);
  box.append(shown);
  const going = [cell, ...cell.others].filter(one => ACTIVE.includes(runs.get(one.run)?.state || one.status));
  if (going.length) {
    const drop = button('Drop', 'drop', going[0].run);
    drop.setAttribute('aria-label', `Drop ${place(going[0])}`);
    drop.disabled = dropping.has(going[0].run);
    box.append(drop);
  }
  return box;
}

function tabulate() {
  const focused = document.activeElement?.dataset, head = made('tr');
  head.append(made('td'), ...told.ranks.map(rank => Object.assign(made('th', `rank ${rank}`), { scope: 'col' })));
  $('.outcome table').replaceChildren(head, ...told.rows.map(row => {
    const line = made('tr');
    line.append(Object.assign(made('th', row.name), { scope: 'row' }), ...row.cells.map(cell => cell ? entry(cell) : made('td', '')));
    return line;
  }));
  if (focused?.does) $(`.outcome [data-does="${focused.does}"][data-run="${focused.run}"]`)?.focus();
  $('.base').textContent = told.base_loss == null ? 'Lower is better.'
    : `Lower is better. The base model: ${loss(told.base_loss)}`
      + (told.base_accuracy == null ? '.' : `, accuracy ${Math.round(100 * told.base_accuracy)} %.`);
  $('.outcome').hidden = false;
  $('.verdict').textContent = told.verdict;
  $('.verdict').hidden = !told.verdict;
  $('.reading-lines').replaceChildren(...told.reading.map(line => made('p', line, 'soft reading')));
  $('.budgets').hidden = !told.budgets.length;
  $('.budgets ul').replaceChildren(...told.budgets.map(one => made('li', one.sentence)));
}

function detail() {
  const cell = picked && find(picked), box = $('.detail');
  box.hidden = !cell;
  if (!cell) return;
  const focused = document.activeElement?.closest('.detail') && document.activeElement.dataset;
  const line = made('p', `Held-out loss ${loss(newest(cell))} · ${big(cell.parameters)} parameters · rate ${rate(cell.rate)} · ${standing(cell.run)}`, 'soft');
  const row = made('div', null, 'does');
  row.append(button('Watch', 'watch', cell.run));
  if (cell.adapter) row.append(button('Compare', 'compare', cell.run), button('Export', 'export', cell.run));
  const lead = cells().find(one => one.others?.some(other => other.run === cell.run)) || cell;
  for (const one of [lead, ...lead.others]) {
    if (one.run !== cell.run) row.append(button(`At rate ${rate(one.rate)}: ${loss(one.loss)}`, 'pick', one.run));
  }
  box.replaceChildren(made('b', `${place(cell)} · ${cell.name}`), line);
  if (cell.error) box.append(made('p', cell.error, 'problem'));
  box.append(row);
  if (focused?.does) box.querySelector(`[data-does="${focused.does}"][data-run="${focused.run}"]`)?.focus();
}

function stand() {  // what moves between two tables
  for (const shown of element.querySelectorAll('.cell .standing')) {
    const box = shown.closest('button'), now = standing(box.dataset.run), reached = loss(newest(find(box.dataset.run)));
    if (shown.textContent !== now) shown.textContent = now;
    if (box.querySelector('b').textContent !== reached) box.querySelector('b').textContent = reached;
  }
}

$('.outcome').addEventListener('click', async event => {
  const { does, run } = event.target.closest('button')?.dataset || {};
  if (does === 'pick') {
    picked = picked === run ? null : run;
    strong = picked;
    tabulate();
    detail();
    race();
  } else if (does === 'drop') {
    event.target.disabled = true;
    dropping.add(run);
    const { problem } = await server.drop({ run });
    say($('.note'), problem);
    tick();
  } else if (does) trigger(does, { run });
});
$('.resume').addEventListener('click', async event => {
  event.target.disabled = true;
  const { problem } = await done(() => server.resume({ study }));
  event.target.disabled = false;
  say($('.note'), problem);
  tick();
});
for (const kind of ['pointerover', 'focusin']) $('.outcome').addEventListener(kind, event => light(event.target.closest('.cell')?.dataset.run));
for (const kind of ['pointerleave', 'focusout']) $('.outcome').addEventListener(kind, () => light());
function light(run) {
  const now = run || picked;
  if (now === strong || $('.race').hidden) return;
  strong = now;
  race();
}

// ---- state -------------------------------------------------------------------------------------------------------

function pace() {
  const all = [...runs.values()], count = (...states) => all.filter(one => states.includes(one.state)).length;
  const step = all.reduce((sum, one) => sum + (OVER.includes(one.state) ? one.steps : one.step), 0);
  const share = Math.round(100 * step / Math.max(1, all.reduce((sum, one) => sum + one.steps, 0)));
  const parts = [`${count(...OVER)} of ${all.length} runs ended`], broken = count('paused', 'lost');
  if (count('running')) parts.push(`${count('running')} training`);
  if (count('queued')) parts.push(`${count('queued')} waiting`);
  for (const one of ['paused', 'lost', 'failed']) if (count(one)) parts.push(`${count(one)} ${WORDS[one]}`);
  $('.pace').hidden = false;
  const line = parts.join(' · ');
  if ($('.state').textContent !== line) $('.state').textContent = line;
  $('.state').dataset.state = state === 'active' ? 'running' : count('failed', 'lost') ? 'failed' : broken ? 'paused' : 'done';
  $('.resume').hidden = !broken || !cells().some(one => one.resumable);
  $('.bar i').style.width = `${share}%`;
  $('.bar').setAttribute('aria-valuenow', share);
  element.dataset.state = state;
  element.dataset.study = study;
  element.dataset.points = [...curves.values()].reduce((sum, one) => sum + one.train[0].length, 0);
}

function list() {
  choice.hidden = told.listed.length < 2;
  if (document.activeElement === choice) return;
  choice.replaceChildren(...told.listed.map(one => Object.assign(made('option', one.label), { value: one.study })));
  choice.value = study;
}
choice.addEventListener('change', () => { props.value = choice.value; start(); });

// ---- asking ------------------------------------------------------------------------------------------------------

async function take(news) {
  if (news.asked !== asked) return;  // an answer to an older question
  if (news.state === 'missing' || news.state === 'none') {
    element.dataset.state = state = news.state;
    if (state === 'missing') {
      $('.name').textContent = 'This study is not here';
      $('.line').textContent = 'Its runs were deleted, or belong to another app.';
    }
    return;
  }
  if (news.study !== study) {  // a newer one has come while no certain one was asked for
    forget();
    study = news.study;
    [...element.querySelectorAll('section, .detail, .verdict, .note')].forEach(one => { one.hidden = true; });
  }
  state = news.state;
  for (const one of news.runs) runs.set(one.run, one);
  let moved = gather(news.runs, seen, curves);
  if (news.table) {
    [told, token] = [news.table, news.token];
    $('.name').textContent = `${told.name} · ${told.model.replace(/\/+$/, '').split('/').pop()}`;
    $('.line').textContent = `${told.rows.length} × ${told.ranks.length} cells${told.rates.length > 1 ? `, ${told.rates.length} rates each` : ''}`;
    list();
    tabulate();
    detail();
    await against(news.figure);
    moved = true;
  }
  if (!told) return;
  address(element.offsetParent);
  stand();
  pace();
  if (moved) await race();
}

const tick = asking(async () => {
  await take(await server.poll({ study: asked, seen, known: token }));
  return state === 'active' ? EAGER : IDLE;
});

function address(shown) {  // the address names the study only while it is looked at
  const url = new URL(location);
  shown && study ? url.searchParams.set('study', study) : url.searchParams.delete('study');
  if (url.href !== location.href) history.replaceState(history.state, '', url);
}

function start() {
  const wanted = props.value || '';
  if (wanted !== asked) {
    const same = wanted === study;
    asked = wanted;
    if (!same) {
      forget();
      study = '';
      [...element.querySelectorAll('section, .detail, .verdict, .note, .pace')].forEach(one => { one.hidden = true; });
      delete element.dataset.state;
    }
  }
  tick();
}

forget();
watch('value', () => {
  start();
  if (innerWidth < 800 && element.offsetParent) element.scrollIntoView({ block: 'start' });  // it lies under the form
});
new IntersectionObserver(entries => {
  const shown = element.offsetParent !== null;
  if (entries.some(entry => entry.isIntersecting)) {
    for (const drawn of [plot, sizes]) if (drawn.layout) Plotly.Plots.resize(drawn);
    address(true);
    tick();
  } else if (!shown) address(false);
}).observe(element);
start();
