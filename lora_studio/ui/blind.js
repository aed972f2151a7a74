// Draws props.value, what the page may know of a blind test; votes by button or by the keys 1 to 4.
const $ = name => element.querySelector(name);
const KEYS = { 1: 'a', 2: 'b', 3: 'tie', 4: 'bad' };
let sent = '';  // the pair that a vote is on its way for

function made(kind, text, name) {
  const one = document.createElement(kind);
  one.textContent = text;
  if (name) one.className = name;
  return one;
}

function waiting({ trial, number, state }) {
  if (!trial || number >= 0 || state === 'revealed') return '';
  return state === 'writing' ? 'The next pair is being written.' : 'You have voted on all pairs.';
}

function pair(one) {
  const card = made('article', ''), both = made('div', '', 'pair-of');
  both.append(...one.answers.map(({ name, text }) => {
    const side = made('div', '', name === one.vote ? 'preferred' : '');
    side.append(made('h4', name), made('p', text));
    return side;
  }));
  card.append(made('p', one.prompt, 'asked'), both, made('p', `Your vote: ${one.vote}`, 'soft'));
  return card;
}

function draw() {
  const told = props.value || {}, open = told.number >= 0;
  $('.empty').hidden = !!told.trial;
  $('.open').hidden = !open;
  $('.wait').textContent = waiting(told);
  $('.outcome').hidden = !told.trial;
  if (!told.trial) return;
  if (open) {
    const more = told.state === 'writing' ? ' so far' : '';
    $('.place').textContent = `Pair ${told.place} of ${told.of}${more}`;
    $('.open .asked').textContent = told.prompt;
    element.querySelectorAll('.open .pair-of p').forEach((place, side) => { place.textContent = told.shown[side]; });
  }
  $('.verdict').textContent = told.standing;
  $('.votes').textContent = told.votes;
  $('[data-does=reveal]').hidden = told.state === 'revealed';
  $('[data-does=download]').disabled = !told.decided;
  $('.pairs').replaceChildren(...told.pairs.map(pair));
}

function cast(vote) {
  const { trial, number } = props.value;
  if (!(number >= 0) || sent === `${trial} ${number}`) return;
  sent = `${trial} ${number}`;
  trigger('vote', { trial, number, vote });
}

element.addEventListener('click', event => {
  const { vote, does } = event.target.closest('button')?.dataset || {};
  if (vote) cast(vote);
  if (does === 'reveal') trigger('reveal', { trial: props.value.trial });
  if (does === 'download') trigger('download', { trial: props.value.trial });
});

function pressed(event) {
  if (!element.isConnected) return document.removeEventListener('keydown', pressed);
  const writes = event.target.closest('input, textarea, select, [contenteditable=true]');
  if (writes || event.ctrlKey || event.metaKey || event.altKey || event.repeat || !KEYS[event.key]) return;
  if ($('.open').offsetParent) cast(KEYS[event.key]);
}

document.addEventListener('keydown', pressed);
watch('value', draw);
draw();
