// Draws props.value, {name, turns: [{said, base, adapted, strength}], note}; the newest turn grows.
const $ = name => element.querySelector(name);
const box = $('.turns');

function made(kind, text, name) {
  const one = document.createElement(kind);
  one.textContent = text;
  if (name) one.className = name;
  return one;
}

function turn() {
  const one = made('article', ''), pair = made('div', '', 'pair-of');
  for (const side of ['base', 'adapted']) {
    const answer = made('div', '', side);
    answer.append(made('h4', ''), made('p', ''));
    pair.append(answer);
  }
  one.append(made('p', '', 'said'), pair);
  return one;
}

function put(place, text) { if (place.textContent !== text) place.textContent = text; }

function draw() {
  const { name = '', turns = [], note = '' } = props.value || {};
  const low = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  $('.empty').hidden = turns.length > 0;
  box.hidden = !turns.length;
  put($('.note'), note);
  while (box.children.length > turns.length) box.lastChild.remove();
  while (box.children.length < turns.length) box.append(turn());
  turns.forEach((one, number) => {
    const place = box.children[number];
    put(place.querySelector('.said'), one.said);
    put(place.querySelector('.base h4'), 'Base');
    put(place.querySelector('.adapted h4'), `${name} · strength ${one.strength}`);
    put(place.querySelector('.base p'), one.base);
    put(place.querySelector('.adapted p'), one.adapted);
  });
  if (low) box.scrollTop = box.scrollHeight;
}

watch('value', draw);
draw();
