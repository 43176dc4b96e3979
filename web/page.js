// The page: a form, a few figures and a chart. It computes nothing; the Worker does, and sends what to show.
//
// Messages to the Worker:   look {slot} | diagnose | join {token, name, engine, source, resume} | leave | hide
// Messages from the Worker: left | kept | member | note | diagnosis | state | device | loading | plan | step | round | members |
//                           traffic | held
// `data-*` on the root element mirror what is shown, for automation.

import { lossChart } from './chart.js';

const root = document.documentElement;
const element = (id) => document.getElementById(id);

const STATES = {
  idle: 'Ready to join',
  unsupported: 'No GPU here',
  connecting: 'Connecting',
  loading: 'Loading the model',
  waiting: 'Waiting',
  training: 'Training',
  done: 'Finished',
  error: 'Stopped',
};

// What can be missing, in the order in which it is looked for, and what to do about each.
const PROBLEMS = {
  secure: {
    title: 'This address is not secure, so the browser hides the GPU',
    remedy:
      'Browsers offer WebGPU only over HTTPS or on localhost. Open the https:// link that the server printed and accept its ' +
      'certificate once (it was made by that server, so the browser cannot know it).',
  },
  webgpu: {
    title: 'This browser has no WebGPU',
    remedy:
      'Use a current Chrome or Edge (Android 12 or later, Windows, macOS, ChromeOS), Safari 26 on iPhone, iPad and Mac, or ' +
      'Firefox on Windows and macOS. On Linux, WebGPU may need to be switched on in the browser’s settings.',
  },
  adapter: {
    title: 'The browser offers no graphics adapter',
    remedy:
      'WebGPU is there, but no usable GPU. Update the graphics driver and see that “use graphics acceleration” is on in the ' +
      'browser’s settings. Virtual machines often have none.',
  },
  limits: {
    title: 'This GPU is too small for the model',
    remedy: 'Another device, or a run with a smaller model, will work.',
  },
};

const view = {
  token: '',
  file: null,
  running: false,
  engineChosen: false,
  rounds: 0,
  localSteps: 0,
  lossPoints: [],
  validPoints: [],
  wakeLock: null,
};

// The name of what the Worker keeps of a run lives as long as this tab, through reloads.
const SLOT = 'sflllm-slot';

const worker = new Worker(new URL('./worker.js', import.meta.url), { type: 'module' });
const chart = lossChart(element('chart'));

// ---- what is shown ------------------------------------------------------------------------------------------------

function setState(state, message = '') {
  root.dataset.state = state;
  root.dataset.message = message;
  element('status-text').textContent = STATES[state];
  element('run-detail').textContent = message;
  element('run-title').textContent = STATES[state];
  const running = ['connecting', 'loading', 'waiting', 'training'].includes(state);
  view.running = running;
  const shown = running || state === 'done' || (state === 'error' && view.lossPoints.length > 0);
  element('run').hidden = !shown;
  element('intro').hidden = shown;
  element('join').hidden = running || state === 'done';
  element('leave').textContent = running ? 'Leave' : 'Join again';
  element('leave').hidden = state === 'error';
  if (state !== 'connecting' && state !== 'loading') {
    element('progress').value = view.rounds ? Number(root.dataset.step) / (view.rounds * view.localSteps) : 0;
  }
  if (state === 'done') element('progress').value = 1;
  if (running) hideProblem();
  keepAwake(running);
}

function showProblem(title, remedy) {
  element('problem-title').textContent = title;
  element('problem-remedy').textContent = remedy;
  element('problem').hidden = false;
}

function hideProblem() {
  element('problem').hidden = true;
}

function bytes(count) {
  if (count < 1000) return `${count} B`;
  const units = ['kB', 'MB', 'GB', 'TB'];
  let value = count;
  let unit = -1;
  do {
    value /= 1000;
    unit += 1;
  } while (value >= 999.5 && unit < units.length - 1);
  return `${value.toFixed(value < 10 ? 1 : 0)} ${units[unit]}`;
}

function shortNumber(value, digits) {
  return Number.isFinite(value) ? value.toLocaleString('en', { maximumFractionDigits: digits, minimumFractionDigits: digits }) : '–';
}

let drawing = false;
function draw() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    chart.draw(view.lossPoints, view.validPoints, view.rounds * view.localSteps);
  });
}

// ---- what the Worker says -----------------------------------------------------------------------------------------

const handlers = {
  // An earlier visit left a run. This tab's own is gone on with at once where that is asked for.
  left({ own, client, round }) {
    element('continue').textContent = `Continue the run as client ${client}, from round ${round}`;
    element('continue').hidden = own && view.joinAtOnce;
  },

  kept({ slot }) {
    element('continue').hidden = true;
    try {
      if (slot) sessionStorage.setItem(SLOT, slot);
      else sessionStorage.removeItem(SLOT);
    } catch {
      // Without storage a reload begins anew.
    }
  },

  member({ client }) {
    root.dataset.client = String(client);
  },

  note({ message }) {
    element('note').textContent = message;
    element('note').hidden = !message;
  },

  diagnosis({ failed, device, detail }) {
    root.dataset.device = device;
    if (!failed) {
      element('device').textContent = `Will compute on ${device}.`;
      if (view.joinAtOnce) join('own');
      return;
    }
    const problem = PROBLEMS[failed];
    view.joinAtOnce = view.joinAtOnce && view.engineChosen;
    element('device').textContent = 'Will compute on the CPU: slower, and warmer on a phone.';
    element('engine').value = 'cpu';
    element('engine').options[0].disabled = true;
    if (view.joinAtOnce) {
      join('own');
      return;
    }
    element('join-button').textContent = 'Join with the CPU (slower)';
    showProblem(problem.title, `${problem.remedy}${detail ? ` (${detail})` : ''} You can still join with the CPU; it is slower.`);
    setState('unsupported', problem.title);
  },

  state({ state, message, title, remedy }) {
    setState(state, message);
    if (state === 'error') {
      showProblem(title || 'The run stopped here', remedy || message);
      element('join-button').disabled = false;
      element('join-button').textContent = 'Join again';
      element('problem').scrollIntoView({ block: 'nearest' });
    }
  },

  device({ device }) {
    root.dataset.device = device;
    element('run-device').textContent = `Computing on ${device}.`;
  },

  loading({ done, total, unit }) {
    element('progress').value = total ? done / total : 0;
    element('run-detail').textContent = unit
      ? `Reading the text: ${shortNumber(done, 0)} of ${shortNumber(total, 0)} ${unit}`
      : `Loading the model: ${bytes(done)} of ${bytes(total)}`;
  },

  plan({ rounds, localSteps }) {
    clearCurve();
    view.rounds = rounds;
    view.localSteps = localSteps;
    draw();
  },

  step({ round, step, loss, tokensPerSecond }) {
    root.dataset.round = String(round);
    root.dataset.step = String(step);
    root.dataset.loss = String(loss);
    // A round that lost its members is run again: its first attempt no longer counts.
    while (view.lossPoints.at(-1)?.step >= step) view.lossPoints.pop();
    const before = view.lossPoints.at(-1)?.smoothed ?? loss;
    view.lossPoints.push({ step, loss, smoothed: before + 0.15 * (loss - before) });
    element('loss').textContent = shortNumber(loss, 3);
    if (tokensPerSecond > 0) element('speed').textContent = shortNumber(tokensPerSecond, 0);
    element('progress').value = view.rounds ? step / (view.rounds * view.localSteps) : 0;
    element('run-detail').textContent = view.rounds
      ? `Round ${round} of ${view.rounds}, step ${step} of ${view.rounds * view.localSteps}`
      : `Round ${round}, step ${step}`;
    draw();
  },

  round({ round, step, validLoss, validPerplexity }) {
    root.dataset.round = String(round);
    if (validPerplexity > 0) {
      view.validPoints.push({ step, loss: validLoss });
      element('perplexity').textContent = shortNumber(validPerplexity, 2);
      const item = document.createElement('li');
      item.textContent = `${round === 0 ? 'before' : `round ${round}`}: ${shortNumber(validPerplexity, 2)}`;
      element('rounds').append(item);
      element('rounds-block').hidden = false;
      draw();
    }
  },

  members({ count }) {
    element('peers').textContent = String(count);
  },

  traffic({ sent, received }) {
    root.dataset.sent = String(sent);
    root.dataset.received = String(received);
    element('sent').textContent = bytes(sent);
    element('received').textContent = bytes(received);
  },

  // Bytes of the engine's memory and of its buffers on the GPU.
  held({ memory, gpu }) {
    root.dataset.held = String(memory + gpu);
    root.dataset.heldGpu = String(gpu);
    element('run-device').textContent = `Computing on ${root.dataset.device}, in ${bytes(memory + gpu)} of memory.`;
  },
};

worker.onmessage = ({ data }) => handlers[data.type](data);
worker.onerror = (event) => {
  handlers.state({
    state: 'error',
    message: 'The engine stopped',
    title: 'The engine stopped',
    remedy: `Reload the page and join again. If this comes back, the browser may be too old. (${event.message || 'no details'})`,
  });
};

// ---- what the person does -----------------------------------------------------------------------------------------

function clearCurve() {
  Object.assign(view, { lossPoints: [], validPoints: [], rounds: 0, localSteps: 0 });
  Object.assign(root.dataset, { step: '0', round: '0', loss: '' });
  element('rounds').replaceChildren();
  element('rounds-block').hidden = true;
}

// `resume` is 'own' to go on with what this tab had before it was loaded again, 'left' for whatever an earlier visit left.
function join(resume = null) {
  const wantsFile = element('join').elements.data.value === 'file';
  if (wantsFile && !view.file && resume !== 'left') {
    element('file').click();
    return;
  }
  clearCurve();
  for (const id of ['loss', 'perplexity', 'speed', 'peers', 'sent', 'received']) element(id).textContent = '–';
  element('run-device').textContent = '';
  draw();
  setState('connecting', 'Asking the server for a place in the run');
  worker.postMessage({
    type: 'join',
    token: view.token || element('token').value.trim(),
    name: element('name').value.trim(),
    engine: element('engine').value,
    source: wantsFile && view.file ? { kind: 'file', file: view.file } : { kind: 'demo' },
    resume,
  });
  element('leave').focus({ preventScroll: true });
}

element('join').addEventListener('submit', (event) => {
  event.preventDefault();
  join();
});

element('continue').addEventListener('click', () => join('left'));

element('leave').addEventListener('click', () => {
  if (view.running) {
    worker.postMessage({ type: 'leave' });
  } else {
    setState('idle');
    element('join-button').textContent = 'Join';
    element('join-button').focus();
  }
});

element('file').addEventListener('change', () => {
  const [file] = element('file').files;
  if (!file) return;
  view.file = file;
  element('file-name').textContent = `${file.name}, ${bytes(file.size)}. Never uploaded.`;
});

for (const choice of element('join').elements.data) {
  choice.addEventListener('click', () => {
    if (choice.value === 'file') element('file').click();
  });
}

element('engine').addEventListener('change', () => {
  const cpu = element('engine').value === 'cpu';
  element('device').textContent = cpu
    ? 'Will compute on the CPU: slower, and warmer on a phone.'
    : `Will compute on ${root.dataset.device}.`;
});

// ---- small services -----------------------------------------------------------------------------------------------

// A phone that locks its screen stops training. Not every browser has wake locks, and none gives one to a hidden page.
async function keepAwake(wanted) {
  if (!wanted) {
    view.wakeLock?.release().catch(() => {});
    view.wakeLock = null;
    return;
  }
  if (view.wakeLock || !navigator.wakeLock || document.visibilityState !== 'visible') return;
  try {
    const lock = await navigator.wakeLock.request('screen');
    view.wakeLock = lock;
    lock.addEventListener('release', () => {
      if (view.wakeLock === lock) view.wakeLock = null;
    });
  } catch {
    // Refused, for instance to save the battery: training goes on until the screen locks.
  }
}

document.addEventListener('visibilitychange', () => keepAwake(view.running));
window.addEventListener('pagehide', () => worker.postMessage({ type: 'hide' }));

function deviceName() {
  const agent = navigator.userAgent;
  const first = (pairs, otherwise) => (pairs.find(([pattern]) => pattern.test(agent)) || [null, otherwise])[1];
  const browser = first([[/Edg\//, 'Edge'], [/Firefox\//, 'Firefox'], [/Chrom(e|ium)\//, 'Chrome'], [/Safari\//, 'Safari']], 'browser');
  const system = first(
    [[/iPhone/, 'iPhone'], [/iPad/, 'iPad'], [/Android/, 'Android'], [/CrOS/, 'ChromeOS'], [/Mac OS X/, 'Mac'], [/Windows/, 'Windows'], [/Linux/, 'Linux']],
    'device',
  );
  return `${browser} on ${system}`;
}

// The join code travels in the fragment, which browsers never send to a server; once read, it leaves the address bar.
function readAddress() {
  const fragment = new URLSearchParams(location.hash.slice(1));
  const query = new URLSearchParams(location.search);
  view.token = fragment.get('t') || '';
  if (location.hash) history.replaceState(null, '', location.pathname + location.search);
  if (view.token) element('token-field').hidden = true;
  view.joinAtOnce = query.get('join') === '1';
  view.engineChosen = query.get('device') === 'cpu';
  if (view.engineChosen) element('engine').value = 'cpu';
  element('name').value = query.get('name') || deviceName();
}

function ownSlot() {
  try {
    return sessionStorage.getItem(SLOT);
  } catch {
    return null;
  }
}

readAddress();
setState('idle');
draw();
worker.postMessage({ type: 'look', slot: ownSlot() });
if (view.engineChosen && view.joinAtOnce) {
  root.dataset.device = 'CPU';
  join('own');
} else {
  worker.postMessage({ type: 'diagnose' });
}
