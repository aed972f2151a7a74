// Draws props.value, a plotly figure as plain JSON, in the page's own font and colours; {} is no figure.
const plot = element.querySelector('.figure');

function colour(name) { return getComputedStyle(element).getPropertyValue(name).trim(); }

async function draw() {
  const given = JSON.parse(JSON.stringify(props.value || {}));  // plotly keeps and changes what it is given
  element.hidden = !given.data;
  if (!given.data) return Plotly.purge(plot);
  const layout = {
    ...given.layout,
    font: { ...given.layout.font, color: colour('--body-text-color'), family: colour('--font') },
    hoverlabel: { bgcolor: colour('--background-fill-primary'), bordercolor: colour('--border-color-primary'),
      font: { color: colour('--body-text-color') } },
  };
  plot.style.minHeight = `${layout.height}px`;
  await Plotly.react(plot, given.data, layout, { responsive: true, displayModeBar: false, displaylogo: false });
}

watch('value', draw);
new IntersectionObserver(entries => {
  if (entries.some(entry => entry.isIntersecting) && plot.layout) Plotly.Plots.resize(plot);
}).observe(element);
draw();
