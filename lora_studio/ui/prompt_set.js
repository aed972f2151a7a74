// Draws props.value, {names, rows: [{prompt, target, answers: [{text, score}]}], line, scores, badge}, a row when it
// changed. The first answer is the base model's; words of the others that it does not say are marked.
let drawn = [];  // per row, what stands there

function heading(text, scope, name) { return Object.assign(made('th', text, name), { scope }); }

function answer(found, base) {
  if (!found) return made('td', '…', 'soft');
  const cell = made('td');
  cell.append(...(base && found !== base ? marked(base.text, found.text) : [found.text]));
  if (found.score) cell.append(made('small', found.score, found.score === 'exact match' ? 'hit' : ''));
  return cell;
}

function line(row, wanted, columns) {
  const all = made('tr');
  all.append(heading(row.prompt, 'row', 'prompt'), ...(wanted ? [made('td', row.target)] : []));
  for (let place = 0; place < columns; place++) all.append(answer(row.answers[place], row.answers[0]));
  return all;
}

function draw() {
  const { names = [], rows = [], line: said = '', scores = [], badge } = props.value || {};
  const wanted = rows.some(row => row.target), body = $('tbody');
  $('.line').textContent = said;
  $('.empty').hidden = rows.length > 0;
  $('.scroll').hidden = !rows.length;
  const head = made('tr');
  head.append(...['Prompt', ...(wanted ? ['Wanted'] : [])].map(name => heading(name, 'col')), ...names.map((name, place) => {
    const cell = heading(name, 'col');
    if (scores[place]) cell.append(made('small', scores[place]));
    if (badge && !place) cell.append(made('span', badge[1], `badge ${badge[0]}`));
    return cell;
  }));
  $('thead').replaceChildren(head);
  while (body.children.length > rows.length) body.lastChild.remove();
  drawn.length = rows.length;
  rows.forEach((row, number) => {
    const now = JSON.stringify([row, wanted, names.length]);
    if (drawn[number] === now) return;
    drawn[number] = now;
    const fresh = line(row, wanted, names.length);
    body.children[number] ? body.children[number].replaceWith(fresh) : body.append(fresh);
  });
}

watch('value', draw);
draw();
