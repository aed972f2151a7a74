// The table of all runs: sorted, searched and paged here; asks server.poll for what is new of it and of what is chosen.
// Everything a person wrote goes into the page as textContent.
const plot = $('.plot'), search = $('.search'), form = $('.about');
const EAGER = often(1500), PAGE = 50;
const MOST = +$('.runs-view').dataset.most;  // that are chosen at once
const WORDS = { queued: 'waiting', running: 'running', paused: 'paused', done: 'done', stopped: 'stopped', failed: 'failed',
  lost: 'broken off', damaged: 'damaged' };

let rows = [], token = '', seen = {}, sheet = null, by = 'step', sort = 'created', down = true, page = 0;
const chosen = new Set(), open = new Set(), curves = new Map(), tables = new Map();  // tables: of the studies that are open

// ---- words -------------------------------------------------------------------------------------------------------

const loss = value => value == null ? '–' : value.toPrecision(value < 10 ? 3 : 4);
const percent = share => share == null ? '–' : `${(100 * share).toFixed(0)} %`;
const change = (from, to, words) => to == null ? '' : from == null ? words(to) : `${words(from)} → ${words(to)}`;
const big = value => value == null ? '' : value.toLocaleString('en');
const when = seconds => new Date(1000 * seconds).toLocaleString('en-GB', { dateStyle: 'short', timeStyle: 'short' });
const standing = one => one.state === 'running' ? `${one.step} of ${one.steps}` : big(one.step);

const OF_ADAPTER = ['compare', 'inside', 'export'], OF_ONE = ['watch', 'clone', ...OF_ADAPTER];  // what is done to a run

const COLUMNS = {  // name: heading, what is shown, what is sorted by
  state: ['State', one => WORDS[one.state], one => one.state],
  name: ['Name', one => one.name, one => one.name.toLowerCase()],
  base: ['Base', one => one.base],
  method: ['Method', one => one.method],
  dataset: ['Dataset', one => one.dataset],
  step: ['Steps', standing, one => one.step],
  loss: ['Held-out loss', one => change(one.base_loss, one.loss, loss), one => one.loss],
  accuracy: ['Accuracy', one => change(one.base_accuracy, one.accuracy, percent), one => one.accuracy],
  parameters: ['Parameters', one => one.most > one.parameters ? `${big(one.parameters)} to ${big(one.most)}` : big(one.parameters), one => one.parameters],
  seconds: ['Time', one => one.seconds == null ? '' : one.runs ? `up to ${duration(one.seconds)} each` : duration(one.seconds), one => one.seconds],
  created: ['Started', one => when(one.created), one => one.created],
};

// ---- the table ---------------------------------------------------------------------------------------------------

function groups() {  // what stands in the table: runs, and a study as one row of its runs
  const wanted = search.value.trim().toLowerCase(), found = new Map();
  for (const one of rows) {
    if (wanted && !one.name.toLowerCase().includes(wanted)) continue;
    const key = one.study || one.run;
    if (!found.has(key)) found.set(key, []);
    found.get(key).push(one);
  }
  const all = [...found].map(([key, runs]) => runs[0].study ? study(key, runs) : runs[0]);
  return sorted(all);
}

function sorted(all) {  // what has no value is last either way
  const value = COLUMNS[sort][2] || COLUMNS[sort][1];
  return all.map(one => [value(one), one]).sort(([a], [b]) => {
    if (a == null || b == null || a === '' || b === '') return (a == null || a === '') - (b == null || b === '');
    return (a < b ? -1 : a > b) * (down ? -1 : 1);
  }).map(([, one]) => one);
}

function study(key, runs) {
  const states = new Set(runs.map(one => one.state)), first = runs.at(-1);
  const state = ['running', 'queued', 'lost', 'paused', 'failed', 'stopped', 'done', 'damaged'].find(one => states.has(one));
  const figures = name => runs.map(one => one[name]).filter(value => value != null);
  const best = runs.filter(one => one.loss != null).sort((a, b) => a.loss - b.loss)[0];
  const sizes = figures('parameters'), seconds = figures('seconds');
  return { ...first, key, runs, state, run: null, name: `Study of ${runs.length} runs: ${first.dataset}`, method: 'rank × matrices',
    step: figures('step').reduce((a, b) => a + b, 0), loss: best?.loss, accuracy: best?.accuracy,
    parameters: sizes.length ? Math.min(...sizes) : null, most: Math.max(...sizes),
    seconds: seconds.length ? Math.max(...seconds) : null };  // they may have trained together
}

function draw() {
  const focused = document.activeElement?.dataset?.focus, all = groups(), pages = Math.max(1, Math.ceil(all.length / PAGE));
  page = Math.min(page, pages - 1);
  const labelled = rows.some(one => one.accuracy != null || one.base_accuracy != null);
  const first = element.clientWidth < 600 ? ['state', 'name', 'loss'] : [];  // so that a phone has them in view
  const shown = [...new Set([...first, ...Object.keys(COLUMNS)])].filter(name => name !== 'accuracy' || labelled);
  $('.empty').hidden = rows.length > 0;
  $('.live-head input').hidden = $('.scroll').hidden = !rows.length;
  $('thead tr').replaceChildren(made('td'), ...shown.map(heading));
  $('tbody').replaceChildren(...all.slice(page * PAGE, (page + 1) * PAGE).flatMap(one => one.runs ? block(one, shown) : [row(one, shown)]));
  $('.pages').hidden = pages < 2;
  $('.pages output').textContent = `${page + 1} of ${pages}, ${big(rows.length)} runs`;
  for (const one of element.querySelectorAll('[data-page]')) one.disabled = !all[(page + +one.dataset.page) * PAGE];
  element.dataset.rows = rows.length;
  if (focused) element.querySelector(`[data-focus="${CSS.escape(focused)}"]`)?.focus();
}

function heading(name) {
  const cell = made('th'), press = made('button', COLUMNS[name][0]);
  cell.scope = 'col';
  press.type = 'button';
  press.dataset.sort = press.dataset.focus = name;
  if (name === sort) {
    cell.ariaSort = down ? 'descending' : 'ascending';
    press.append(made('i', down ? ' ↓' : ' ↑'));
  }
  cell.append(press);
  return cell;
}

function chooser(one, runs) {  // the box that chooses it
  const box = made('input'), cell = made('td');
  box.type = 'checkbox';
  box.dataset.choose = runs.join(' ');
  box.dataset.focus = `choose ${one.key || one.run}`;
  box.checked = runs.every(run => chosen.has(run));
  box.indeterminate = !box.checked && runs.some(run => chosen.has(run));
  box.setAttribute('aria-label', `Choose ${one.name}`);
  cell.append(box);
  return cell;
}

function cells(one, shown) {
  return shown.map(name => {
    const cell = made(name === 'name' ? 'th' : 'td'), said = COLUMNS[name][1](one);
    cell.dataset.column = name;
    if (name === 'state') cell.append(Object.assign(made('span', said, 'state'), { title: one.reason || '' }));
    else if (name !== 'name') cell.textContent = said;
    if (name === 'state') cell.firstChild.dataset.state = one.state;
    return cell;
  });
}

function row(one, shown, inside) {
  const line = made('tr', null, inside ? 'cell-of' : ''), parts = cells(one, shown), press = made('button', one.name, 'name-of');
  press.type = 'button';
  press.dataset.open = one.run;
  press.dataset.focus = `open ${one.run}`;
  press.title = one.reason || one.remarks || 'Open in tab 2';
  parts[1].scope = 'row';
  parts[1].append(press);
  if (inside?.front === one.run) parts[1].append(made('em', inside.recommended ? 'recommended' : 'leads'));
  if (one.remarks) parts[1].append(made('small', one.remarks));
  line.append(chooser(one, [one.run]), ...parts);
  line.dataset.run = one.run;
  line.classList.toggle('picked', chosen.has(one.run));
  return line;
}

function block(one, shown) {  // a study; open, its table of ranks and matrices and its runs
  const line = made('tr', null, 'study-of'), parts = cells(one, shown), press = made('button', one.name, 'name-of');
  const unfolded = open.has(one.key), told = tables.get(one.key);
  press.type = 'button';
  press.dataset.fold = one.key;
  press.dataset.focus = `fold ${one.key}`;
  press.setAttribute('aria-expanded', unfolded);
  parts[1].scope = 'row';
  parts[1].append(press);
  line.append(chooser(one, one.runs.map(run => run.run)), ...parts);
  if (!unfolded) return [line];
  const inside = made('tr'), cell = made('td'), box = made('div', told ? null : 'Reading the study', 'paper-of');
  cell.colSpan = shown.length + 1;
  if (told) box.append(...paper(told, one.key));
  cell.append(box);
  inside.append(cell);
  return [line, inside, ...sorted(one.runs).map(run => row(run, shown, told || {}))];
}

function paper(told, key) {  // ranks across, matrices down: held-out losses
  const table = made('table', null, 'paper'), head = made('tr'), press = made('button', 'Open the study');
  head.append(made('td'), ...told.ranks.map(rank => Object.assign(made('th', `rank ${rank}`), { scope: 'col' })));
  table.append(head, ...told.rows.map(row => {
    const line = made('tr');
    line.append(Object.assign(made('th', row.name), { scope: 'row' }), ...row.cells.map(cell => {
      const box = made('td', cell ? loss(cell.loss) : '');
      if (cell && cell.run === told.front) box.append(' ', made('em', told.recommended ? 'recommended' : 'leads'));
      return box;
    }));
    return line;
  }));
  press.type = 'button';
  press.dataset.study = press.dataset.focus = key;
  return [made('p', told.verdict, 'soft'), table, press];
}

async function unfold(key) {
  open.has(key) ? open.delete(key) : open.add(key);
  draw();
  if (open.has(key)) await read(key);
}

async function read(key) {
  const told = await done(() => server.table({ study: key }));
  say($('.problem'), told.problem || '');
  if (!told.problem) tables.set(key, told);
  draw();
}

// ---- what is chosen ----------------------------------------------------------------------------------------------

function stand() {
  const count = chosen.size, one = count === 1 && rows.find(row => chosen.has(row.run));
  $('.chosen-bar').hidden = !count;
  $('.count').textContent = `${count} chosen`;
  for (const does of OF_ONE)
    $(`.chosen-bar [data-does=${does}]`).hidden = !one || one.state === 'damaged' || (OF_ADAPTER.includes(does) && !one.adapter);
  $('.chosen-bar [data-does=delete]').textContent = count > 1 ? `Delete ${count}` : 'Delete';
  if (!one || one.state === 'damaged') form.hidden = true;
  if (!count) { sheet = null; $('.overlay').hidden = $('.sheet').hidden = true; }
  element.dataset.chosen = count;
}

function choose(runs, on) {
  for (const run of runs) {
    if (!on) chosen.delete(run);
    else if (chosen.size < MOST) chosen.add(run);
    else say($('.problem'), `At most ${MOST} runs can be chosen at once.`);
  }
  sheet = null;
  stand();
  draw();
  now();
}

async function describe() {
  const one = sheet.columns[0];
  $('.saved').textContent = 'Saving';
  const { problem } = await done(() => server.describe({ run: one.run, name: form.elements.name.value, remarks: form.elements.remarks.value }));
  say($('.problem'), problem);
  $('.saved').textContent = problem ? '' : 'Saved';
  now();
}

function edit() {  // the form of the one that is chosen; what is being typed stays
  const one = sheet.columns.length === 1 && sheet.columns[0];
  form.hidden = !one;
  if (!one) return;
  if (form.dataset.run !== one.run) $('.saved').textContent = '';
  if (form.dataset.run === one.run && form.contains(document.activeElement)) return;
  form.dataset.run = one.run;
  form.elements.name.value = one.called;
  form.elements.remarks.value = one.remarks;
}

function lay() {  // settings in columns
  const only = $('.only input').checked, count = sheet.columns.length;
  $('.sheet').hidden = !count;
  $('.only').hidden = count < 2;
  const shown = sheet.rows.filter(row => !only || count < 2 || row.differs), head = made('tr');
  head.append(made('td'), ...sheet.columns.map(one => Object.assign(made('th', one.name), { scope: 'col' })));
  $('.alike').hidden = shown.length > 0;
  $('.sheet .scroll').hidden = !shown.length;
  $('.sheet table').replaceChildren(head, ...shown.map(row => {
    const line = made('tr');
    line.append(Object.assign(made('th', row.label), { scope: 'row' }), ...row.values.map(value => made('td', value || '–')));
    line.classList.toggle('differs', row.differs && count > 1);
    return line;
  }));
}

async function overlay() {
  const all = sheet.columns.map(one => [one, curves.get(one.run)]).filter(([, own]) => own?.train[0].length || own?.heldout[0].length);
  $('.overlay').hidden = !all.length;
  if (!all.length) return;
  const told = all.every(([, own]) => !own.train[2].includes(null));  // of older runs nobody knows the tokens
  $('[data-by=tokens]').disabled = !told;
  if (!told) by = 'step';
  for (const one of element.querySelectorAll('[data-by]')) one.setAttribute('aria-pressed', one.dataset.by === by);
  const traces = all.flatMap(([one, own]) => {
    const line = { color: one.colour, dash: one.dash }, about = { name: one.label, legendgroup: one.run };
    const hovertemplate = `%{y:.4g} at %{x:,} ${by === 'step' ? 'steps' : 'tokens'}<extra>%{fullData.name}</extra>`;
    return [
      { ...about, x: by === 'step' ? own.train[0] : own.train[2], y: smooth(own.train[1]), mode: 'lines', opacity: .4,
        line: { ...line, width: 1.2 }, showlegend: false, hoverinfo: 'skip' },
      { ...about, x: own.heldout[0].map(step => by === 'step' ? step : tokens_at(step, own.train)), y: own.heldout[1],
        mode: 'lines+markers', line: { ...line, width: 2 }, marker: { size: 7 }, hovertemplate, cliponaxis: false },
    ];
  });
  const bare = chart(340, by === 'step' ? 'step' : 'tokens', 'loss');
  await Plotly.react(plot, traces, { ...bare, showlegend: true, uirevision: `${by}${[...chosen]}`, hovermode: 'closest' }, BARE);
  element.dataset.lines = all.length;
}

function tokens_at(step, [steps, , tokens]) {  // between two points that were kept of a long curve
  const after = steps.findIndex(one => one >= step);
  if (after < 0) return tokens.at(-1) ?? 0;
  const [from, had] = after ? [steps[after - 1], tokens[after - 1]] : [0, 0];
  return had + (tokens[after] - had) * (step - from) / (steps[after] - from);
}

// ---- what a person does ------------------------------------------------------------------------------------------

element.addEventListener('click', async event => {
  const { sort: wanted, page: by_pages, open: opened, fold, study: whole, by: along, does } = event.target.closest('button')?.dataset || {};
  if (wanted) [down, sort] = [wanted === sort ? !down : ['created', 'step', 'seconds', 'accuracy'].includes(wanted), wanted];
  if (by_pages) page = Math.max(0, page + +by_pages);
  if (along) { by = along; await overlay(); }
  if (wanted || by_pages) draw();
  if (opened) trigger('watch', { run: opened });
  if (fold) await unfold(fold);
  if (whole) trigger('study', { study: whole });
  if (does === 'none') choose([...chosen], false);
  if (OF_ONE.includes(does)) trigger(does, { run: [...chosen][0] });
  if (does === 'delete') {
    const { problem } = await done(() => server.delete({ runs: [...chosen] }));
    say($('.problem'), problem);
    await now();
    $('.undo button').focus();
  }
  if (does === 'restore') {
    const { problem } = await done(() => server.restore({ runs: $('.undo').dataset.runs.split(' ') }));
    say($('.problem'), problem);
    now();
  }
});
element.addEventListener('change', event => {
  if (event.target.dataset.choose) { say($('.problem'), ''); choose(event.target.dataset.choose.split(' '), event.target.checked); }
  if (event.target.closest('.only')) lay();
});
search.addEventListener('input', () => { page = 0; draw(); });
form.addEventListener('submit', event => { event.preventDefault(); describe(); });

// ---- asking ------------------------------------------------------------------------------------------------------

async function take(news) {
  if (news.problem) return say($('.problem'), news.problem);
  if (news.rows) {
    [rows, token] = [news.rows, news.token];
    const here = new Set(rows.map(one => one.run));
    for (const run of [...chosen]) if (!here.has(run)) { chosen.delete(run); sheet = null; }
    for (const key of [...open]) rows.some(one => one.study === key) ? read(key) : open.delete(key);
    stand();
    draw();
  }
  let moved = false;
  for (const fresh of news.moved || []) {
    const one = rows.find(row => row.run === fresh.run);
    if (one && (one.step !== fresh.step || one.loss !== fresh.loss)) { Object.assign(one, fresh); moved = true; }
  }
  if (moved) draw();
  const gone = news.deleted;
  $('.undo').hidden = !gone.length;
  $('.undo').dataset.runs = gone.map(one => one.run).join(' ');
  $('.undo span').textContent = gone.length === 1 ? `${gone[0].name} is deleted.` : `${gone.length} runs are deleted.`;
  const drawn = gather(news.runs, seen, curves);
  if (news.sheet) { sheet = news.sheet; edit(); lay(); }
  if (sheet && (news.sheet || drawn)) await overlay();
}

const now = asking(async () => {
  await take(await server.poll({ known: token, chosen: [...chosen], seen, sheet: sheet?.token }));
  return rows.some(one => ACTIVE.includes(one.state)) || !$('.undo').hidden || (chosen.size && !sheet) ? EAGER : IDLE;
});

new IntersectionObserver(entries => {
  if (!entries.some(entry => entry.isIntersecting)) return;
  if (plot.layout) Plotly.Plots.resize(plot);
  now();
}).observe(element);
now();
