// Draws props.value, a list of {title, about, badge: [kind, words] | null, parts: [[text, marked]], pace}.
const box = element.querySelector('.panes'), empty = element.querySelector('.empty');

function made(tag, name, text) {
  const one = document.createElement(tag);
  one.className = name;
  if (text) one.textContent = text;
  return one;
}

function copier(one) {
  const copy = made('button', 'copy', 'Copy');
  copy.type = 'button';
  copy.addEventListener('click', async () => {
    await navigator.clipboard.writeText(one.querySelector('.answer').textContent);
    copy.textContent = 'Copied';
    setTimeout(() => { copy.textContent = 'Copy'; }, 1500);
  });
  return copy;
}

function pane() {
  const one = made('article', 'card');
  one.append(made('h3', 'title'), made('p', 'soft about'), made('span', 'badge'), made('div', 'answer'), made('p', 'soft pace-of'));
  if (navigator.clipboard) one.append(copier(one));  // a page without https has none
  return one;
}

function fill(one, { title, about, badge, parts, pace }, place) {
  const [head, line, sign, answer, foot, copy] = one.children;
  if (copy) copy.hidden = !parts.some(([text]) => text);
  one.dataset.pane = place ? 'adapted' : 'base';
  [head.textContent, line.textContent, foot.textContent] = [title, about, pace];
  sign.hidden = !badge;
  [sign.className, sign.textContent] = badge ? [`badge ${badge[0]}`, badge[1]] : ['badge', ''];
  if (parts.length === 1 && !parts[0][1] && answer.firstChild?.nodeType === Node.TEXT_NODE && answer.childNodes.length === 1) {
    answer.firstChild.data = parts[0][0];  // so that a selection lasts while the text grows
  } else {
    answer.replaceChildren(...parts.map(([text, marked]) => marked ? made('mark', '', text) : document.createTextNode(text)));
  }
}

function draw() {
  const panes = props.value || [];
  empty.hidden = panes.length > 0;
  while (box.children.length > panes.length) box.lastChild.remove();
  while (box.children.length < panes.length) box.append(pane());
  panes.forEach((one, place) => fill(box.children[place], one, place));
}

watch('value', draw);
draw();
