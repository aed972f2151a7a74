// The page's head: news and hardware; what its words mean; the example that an empty tab offers; what cures a problem.
// The last three listen to the whole page, so that a view need only name a word (data-term, which can have the focus) or
// a button: .try-example, and .cure with a control that it presses or settings that it changes.
const news = element.querySelector('.news'), chip = element.querySelector('.chip'), says = element.querySelector('.says');

async function tick() {
  let wait = 1000;
  try {
    const said = await server.status();
    news.textContent = said.line;
    news.classList.toggle('bad', said.problem);
    chip.textContent = said.hardware;
    chip.hidden = !said.hardware;
    if (said.settled) return;
    if (said.problem) wait = 10000;
  } catch (problem) { wait = 5000; }
  if (element.isConnected) setTimeout(tick, wait);
}
tick();

let told = null, enough = false;  // the word that is explained; whether the person wants no more of it

const wordAt = place => place?.closest?.('[data-term]') || null;

function explain(word) {
  if (word === told && word?.isConnected) return;
  told?.removeAttribute('aria-describedby');
  told = word && props.value[word.dataset.term] ? word : null;
  says.hidden = !told;
  if (!told) return;
  says.textContent = props.value[told.dataset.term];
  told.setAttribute('aria-describedby', says.id);
  stand();
}

function stand() {  // beside the word, which may have moved, or not at all
  const place = told?.getBoundingClientRect(), own = says.getBoundingClientRect();
  if (!place || place.bottom < 0 || place.top > innerHeight || !told.isConnected) return explain(null);
  const below = place.bottom + own.height + 8 < innerHeight;
  says.style.left = `${Math.max(8, Math.min(place.left, document.documentElement.clientWidth - own.width - 8))}px`;
  says.style.top = `${below ? place.bottom + 4 : place.top - own.height - 4}px`;
}

document.addEventListener('mouseover', event => {
  const word = wordAt(event.target), focused = enough ? null : wordAt(document.activeElement);
  if (!says.contains(event.target)) explain(word || focused);
});
document.addEventListener('focusin', event => { enough = false; explain(wordAt(event.target)); });
document.addEventListener('focusout', () => explain(null));
document.addEventListener('keydown', event => { if (event.key === 'Escape') { enough = true; explain(null); } });
document.addEventListener('scroll', () => told && stand(), { capture: true, passive: true });
document.addEventListener('click', event => {
  if (event.target.closest?.('.try-example')) trigger('example');
  const { press, change } = event.target.closest?.('.cure')?.dataset || {};
  if (press) document.querySelector(press)?.click();
  if (change) trigger('cure', { change: JSON.parse(change) });
});
