// Buttons for the matrices of props.value; a click changes props.value.chosen and raises 'pick'.
const box = element.querySelector('.picker');

function button(entry, pressed) {
  const made = document.createElement('button');
  made.type = 'button';
  made.textContent = entry.role.replace(/^(attn|mlp)\./, '');
  made.title = `${entry.role}: ${entry.shape}, in ${entry.layers} ${entry.layers === 1 ? 'layer' : 'layers'}`;
  made.dataset.role = entry.role;
  made.setAttribute('aria-label', made.title);
  made.setAttribute('aria-pressed', pressed);
  return made;
}

function draw() {
  const { matrices = [], chosen = [] } = props.value || {};
  const focused = document.activeElement?.dataset?.role;
  box.replaceChildren();
  for (const group of new Set(matrices.map(entry => entry.group))) {
    const line = document.createElement('div'), title = document.createElement('span');
    title.textContent = group;
    line.append(title, ...matrices.filter(entry => entry.group === group)
      .map(entry => button(entry, chosen.includes(entry.role))));
    box.append(line);
  }
  if (focused) box.querySelector(`[data-role="${CSS.escape(focused)}"]`)?.focus();
}

box.addEventListener('click', event => {
  const role = event.target.closest('button')?.dataset.role;
  if (!role) return;
  const { matrices, chosen } = props.value;
  props.value = { matrices, chosen: chosen.includes(role) ? chosen.filter(one => one !== role) : [...chosen, role] };
  draw();
  trigger('pick');
});
watch('value', draw);
draw();
