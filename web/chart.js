// The loss curve: an SVG drawn in CSS pixels, so that its colours and its text are the style sheet's.

const SVG = 'http://www.w3.org/2000/svg';
const LEFT = 34;
const RIGHT = 8;
const TOP = 8;
const BOTTOM = 20;
// More points than this cannot be told apart on any screen this is shown on.
const MOST_POINTS = 600;

function node(name, attributes, text = '') {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

// Round numbers, at most `most` of them, that cover low..high.
function ticks(low, high, most) {
  const rough = (high - low) / most || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) found.push(Number(value.toPrecision(6)));
  return found;
}

function thinned(points) {
  if (points.length <= MOST_POINTS) return points;
  const every = Math.ceil(points.length / MOST_POINTS);
  return points.filter((_, index) => index % every === 0 || index === points.length - 1);
}

// A chart in `svg`; `draw(points, validations, steps)` shows `{step, loss, smoothed}` and `{step, loss}` over 0..steps.
export function lossChart(svg) {
  let last = [[], [], 0];

  function draw(points, validations, steps) {
    last = [points, validations, steps];
    const { width, height } = svg.getBoundingClientRect();
    if (width === 0) return;
    svg.setAttribute('viewBox', `0 0 ${width} ${height}`);
    svg.replaceChildren();

    const losses = [...points, ...validations].map((point) => point.loss).filter(Number.isFinite);
    const low = losses.length ? Math.min(...losses) : 0;
    const high = losses.length ? Math.max(...losses) : 1;
    const margin = (high - low) * 0.08 || 0.5;
    const bottom = Math.max(0, low - margin);
    const top = high + margin;
    const newest = points.at(-1)?.step ?? 0;
    const span = Math.max(steps, newest, 1);
    const x = (step) => LEFT + (step / span) * (width - LEFT - RIGHT);
    const y = (loss) => TOP + ((top - loss) / (top - bottom)) * (height - TOP - BOTTOM);
    const line = (key) => thinned(points).map((point, index) => `${index ? 'L' : 'M'}${x(point.step).toFixed(1)} ${y(point[key]).toFixed(1)}`).join('');

    for (const value of ticks(bottom, top, 4)) {
      svg.append(node('line', { class: 'grid', x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) }));
      svg.append(node('text', { x: LEFT - 6, y: y(value) + 4, 'text-anchor': 'end' }, String(value)));
    }
    for (const value of ticks(0, span, 5).filter(Number.isInteger)) {
      svg.append(node('text', { x: x(value), y: height - 5, 'text-anchor': value === 0 ? 'start' : x(value) > width - 2 * RIGHT ? 'end' : 'middle' }, value === 0 ? 'step 0' : String(value)));
    }
    if (points.length > 0) {
      svg.append(node('path', { class: 'raw', d: line('loss') }));
      svg.append(node('path', { class: 'smoothed', d: line('smoothed') }));
    }
    for (const { step, loss } of validations) svg.append(node('circle', { class: 'validation', cx: x(step), cy: y(loss), r: 4.5 }));

    const summary = points.length
      ? `Loss went from ${points[0].loss.toFixed(2)} to ${points.at(-1).loss.toFixed(2)} over ${points.length} steps`
      : 'Loss: no step yet';
    svg.setAttribute('aria-label', summary);
  }

  new ResizeObserver(() => draw(...last)).observe(svg);
  return { draw };
}
