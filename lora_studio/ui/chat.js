// Draws props.value, {name, turns: [{said, base, adapted, strength}], note, badge, growing}; the newest turn may grow.
const box = $('.turns'), sign = $('.badge');

function turn() {
  const one = made('article'), pair = made('div', null, 'pair-of');
  for (const side of ['base', 'adapted']) {
    const answer = made('div', null, side);
    answer.append(made('h4'), made('p'));
    pair.append(answer);
  }
  one.append(made('p', null, 'said'), pair);
  return one;
}

function put(place, text, against = null) {  // against: the text from which what differs is marked
  const stands = place.textContent === text && place.dataset.against === (against ?? '');
  if (stands) return;
  place.dataset.against = against ?? '';
  if (against == null) place.textContent = text;
  else place.replaceChildren(...marked(against, text));
}

function lower(words) { return words[0].toLowerCase() + words.slice(1); }

function draw() {
  const { name = '', turns = [], note = '', badge, growing } = props.value || {};
  const low = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  $('.empty').hidden = turns.length > 0;
  box.hidden = !turns.length;
  put($('.note'), note);
  sign.hidden = !badge;
  [sign.className, sign.textContent] = badge ? [`badge ${badge[0]}`, `Base side, ${lower(badge[1])}`] : ['badge', ''];
  while (box.children.length > turns.length) box.lastChild.remove();
  while (box.children.length < turns.length) box.append(turn());
  turns.forEach((one, number) => {
    const place = box.children[number], whole = !growing || number < turns.length - 1;
    put(place.querySelector('.said'), one.said);
    put(place.querySelector('.base h4'), 'Base');
    put(place.querySelector('.adapted h4'), `${name} · strength ${one.strength}`);
    put(place.querySelector('.base p'), one.base);
    put(place.querySelector('.adapted p'), one.adapted, whole ? one.base : null);
  });
  if (low) box.scrollTop = box.scrollHeight;
}

watch('value', draw);
draw();
