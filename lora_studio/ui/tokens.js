// Draws props.value, {texts, rows: [{name, chances, said}]}: each token of each row, and what all rows say of the one in focus.
const readout = element.querySelector('.readout'), box = element.querySelector('.rows');
const HINT = 'Point at a token, or walk along with the arrow keys.';

function made(tag, name, text) {
  const one = document.createElement(tag);
  one.className = name;
  one.textContent = text;
  return one;
}

function token(text, row, place) {
  const one = made('span', 'token', text.replaceAll('\n', '⏎\n'));
  one.setAttribute('role', 'option');
  one.setAttribute('aria-selected', 'false');
  one.setAttribute('aria-label', `${text.trim() || 'space'}: ${row.said[place]}`);
  one.style.setProperty('--chance', row.chances[place]);
  one.dataset.place = place;
  one.tabIndex = place ? -1 : 0;
  return one;
}

function line(row, texts) {
  const one = made('div', 'tokens', '');
  one.setAttribute('role', 'listbox');
  one.setAttribute('aria-orientation', 'horizontal');
  one.setAttribute('aria-label', `${row.name}: probability of each token`);
  one.append(...texts.map((text, place) => token(text, row, place)));
  return one;
}

function draw() {
  const { texts = [], rows = [] } = props.value || {};
  element.hidden = !rows.length;
  readout.textContent = HINT;
  box.replaceChildren(...rows.flatMap(row => [made('h4', '', row.name), line(row, texts)]));
}

function show(place) {
  const { texts, rows } = props.value;
  readout.textContent = [`“${texts[place].replaceAll('\n', '⏎')}”`, ...rows.map(row => `${row.name} ${row.said[place]}`)].join(' · ');
  for (const one of box.querySelectorAll('.token')) {
    const here = one.dataset.place === String(place);
    one.classList.toggle('here', here);
    one.setAttribute('aria-selected', here);
  }
}

function step(one, key) {
  const line = one.parentElement, lines = [...box.querySelectorAll('.tokens')], place = Number(one.dataset.place);
  const at = lines.indexOf(line), last = line.children.length - 1;
  const [row, column] = {
    ArrowRight: [at, place + 1], ArrowLeft: [at, place - 1], ArrowDown: [at + 1, place], ArrowUp: [at - 1, place],
    Home: [at, 0], End: [at, last],
  }[key] || [];
  return lines[row]?.children[column];
}

box.addEventListener('mouseover', event => event.target.dataset.place && show(event.target.dataset.place));
box.addEventListener('focusin', event => {
  for (const one of event.target.parentElement.children) one.tabIndex = one === event.target ? 0 : -1;
  show(event.target.dataset.place);
});
box.addEventListener('keydown', event => {
  const next = event.target.dataset.place && step(event.target, event.key);
  if (!next) return;
  event.preventDefault();
  next.focus();
});
watch('value', draw);
draw();
