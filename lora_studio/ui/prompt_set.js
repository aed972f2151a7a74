// Draws props.value, {names, rows: [{prompt, target, answers: [{text, score}]}], line, scores}, a row when it changed.
const $ = name => element.querySelector(name);
let drawn = [];  // per row, what stands there

function cell(kind, text, name) {
  const made = document.createElement(kind);
  made.textContent = text;
  if (name) made.className = name;
  if (kind === 'th') made.scope = name === 'prompt' ? 'row' : 'col';
  return made;
}

function line(row, wanted, columns) {
  const made = document.createElement('tr');
  made.append(cell('th', row.prompt, 'prompt'));
  if (wanted) made.append(cell('td', row.target));
  for (let place = 0; place < columns; place++) {
    const found = row.answers[place], answer = cell('td', found ? found.text : '…');
    if (!found) answer.className = 'soft';
    if (found?.score) answer.append(cell('small', found.score, found.score === 'exact match' ? 'hit' : ''));
    made.append(answer);
  }
  return made;
}

function draw() {
  const { names = [], rows = [], line: said = '', scores = [] } = props.value || {};
  const wanted = rows.some(row => row.target), body = $('tbody');
  $('.line').textContent = said;
  $('.empty').hidden = rows.length > 0;
  $('.scroll').hidden = !rows.length;
  const head = document.createElement('tr');
  head.append(...['Prompt', ...(wanted ? ['Wanted'] : [])].map(name => cell('th', name)), ...names.map((name, place) => {
    const made = cell('th', name);
    if (scores[place]) made.append(cell('small', scores[place]));
    return made;
  }));
  $('thead').replaceChildren(head);
  while (body.children.length > rows.length) body.lastChild.remove();
  drawn.length = rows.length;
  rows.forEach((row, number) => {
    const now = JSON.stringify([row, wanted, names.length]);
    if (drawn[number] === now) return;
    drawn[number] = now;
    const made = line(row, wanted, names.length);
    body.children[number] ? body.children[number].replaceWith(made) : body.append(made);
  });
}

watch('value', draw);
draw();
