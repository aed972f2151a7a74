// What every view that asks the app has in common; it stands before the view's own script.
const $ = name => element.querySelector(name);
const ACTIVE = ['queued', 'running'], IDLE = 10000;

function made(kind, text, name) {
  const one = document.createElement(kind);
  if (text != null) one.textContent = text;
  if (name) one.className = name;
  return one;
}

function say(box, text) { box.textContent = text; box.hidden = !text; }

async function done(act) {  // what the server said, or that it did not answer
  try { return await act(); } catch { return { problem: 'The app does not answer; try again.' }; }
}

function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

// ---- asking ------------------------------------------------------------------------------------------------------

const often = ms => location.hostname.endsWith('.hf.space') ? 2500 : ms;  // a Space refuses who asks more

function asking(ask) {  // ask: one question, its answer taken in; gives the milliseconds until the next. Gives: now
  let timer = null, busy = false, again = false, wait = 1000;
  async function now() {
    clearTimeout(timer);
    if (!element.isConnected) return;
    again = busy;
    if (!busy && !document.hidden && element.offsetParent) {
      busy = true;
      try { wait = await ask(); } catch (problem) { wait = Math.min(Math.max(wait, 1000) * 2, 30000); }
      busy = false;
      if (again) wait = 0;
    }
    timer = setTimeout(now, wait);
  }
  document.addEventListener('visibilitychange', () => document.hidden || now());
  return now;
}

// ---- curves ------------------------------------------------------------------------------------------------------

function colour(name) { return getComputedStyle(element).getPropertyValue(name).trim(); }

function smooth(values) {  // a running mean that starts unbiased; a short run is remembered for less long
  const memory = Math.min(.9, Math.max(.5, 1 - 10 / (values.length || 1)));
  let average = 0, weight = 0;
  return values.map(value => {
    if (value == null) return null;
    average = memory * average + (1 - memory) * value;
    weight = memory * weight + 1 - memory;
    return average / weight;
  });
}

function gather(news, seen, curves) {  // the points of each run that are new; whether there were any
  let moved = false;
  for (const one of news) {
    const known = seen[one.run] || 0;
    if ((one.start !== 0 && one.start !== known) || (one.next === known && one.start === known)) continue;
    if (one.start === 0) curves.set(one.run, { train: [[], [], []], heldout: [[], []] });
    const own = curves.get(one.run);
    for (const name of ['train', 'heldout']) one[name].forEach((part, axis) => own[name][axis].push(...part));
    seen[one.run] = one.next;
    moved = true;
  }
  return moved;
}

function chart(height, x, y) {  // a layout in the page's own font and colours
  const axis = { gridcolor: colour('--border-color-primary'), zeroline: false, automargin: true };
  return {
    height, margin: { l: 44, r: 8, t: 6, b: 38 }, paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)',
    font: { color: colour('--body-text-color'), family: colour('--font'), size: 12 },
    hoverlabel: { bgcolor: colour('--background-fill-primary'), bordercolor: colour('--border-color-primary'),
      font: { color: colour('--body-text-color') }, namelength: -1 },
    legend: { orientation: 'h', x: 0, y: 1.02, yanchor: 'bottom', font: { size: 11 } },
    xaxis: { ...axis, title: { text: x } }, yaxis: { ...axis, title: { text: y } },
  };
}

const BARE = { responsive: true, displayModeBar: false, displaylogo: false };

// ---- what is new in a text ---------------------------------------------------------------------------------------

const WORD = /\s+|[\p{L}\p{N}]+|[^\s\p{L}\p{N}]/gu, MOST_WORDS = 800;

function changed(before, after) {  // the words of `after` as [text, whether it is not of their longest common sequence]
  const a = before.match(WORD) || [], b = after.match(WORD) || [];
  if (a.length > MOST_WORDS || b.length > MOST_WORDS) return [[after, false]];
  const rest = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));  // common words from i, j on
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      rest[i][j] = a[i] === b[j] ? rest[i + 1][j + 1] + 1 : Math.max(rest[i + 1][j], rest[i][j + 1]);
  const pieces = [];
  const put = (text, fresh) => {
    const last = pieces.at(-1);
    if (last && last[1] === fresh) last[0] += text; else pieces.push([text, fresh]);
  };
  for (let i = 0, j = 0; j < b.length;) {
    if (i < a.length && a[i] === b[j]) { put(b[j], false); i++; j++; }
    else if (i < a.length && rest[i + 1][j] >= rest[i][j + 1]) i++;
    else put(b[j++], true);
  }
  return pieces;
}

function marked(before, after) {  // the same as parts of a page
  return changed(before, after).map(([text, fresh]) => made(fresh ? 'mark' : 'span', text));
}

// ---- the view's own ----------------------------------------------------------------------------------------------

