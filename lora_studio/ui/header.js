// The page's head: news and hardware; what its words mean; and the example that an empty tab offers.
// The last two listen to the whole page, so that a view need only name a word (data-term, which can have the focus) or a button (.try-example).
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

let told = null;  // the word that is explained

function explain(term) {
  if (term === told) return;
  told?.removeAttribute('aria-describedby');
  told = term && props.value[term.dataset.term] ? term : null;
  says.hidden = !told;
  if (!told) return;
  says.textContent = props.value[told.dataset.term];
  told.setAttribute('aria-describedby', says.id);
  const word = told.getBoundingClientRect(), own = says.getBoundingClientRect();
  const below = word.bottom + own.height + 8 < innerHeight;
  says.style.left = `${Math.max(8, Math.min(word.left, document.documentElement.clientWidth - own.width - 8))}px`;
  says.style.top = `${below ? word.bottom + 4 : word.top - own.height - 4}px`;
}

const word = event => event.target.closest?.('[data-term]') || null;
document.addEventListener('mouseover', event => event.target === says || explain(word(event)));
document.addEventListener('focusin', event => explain(word(event)));
document.addEventListener('focusout', () => explain(null));
document.addEventListener('keydown', event => event.key === 'Escape' && explain(null));
document.addEventListener('scroll', () => explain(null), { capture: true, passive: true });
document.addEventListener('click', event => event.target.closest?.('.try-example') && trigger('example'));
