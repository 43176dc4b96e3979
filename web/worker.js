// The Worker: moves bytes between the network, the page and the engine, which is Rust compiled to WebAssembly.
//
// The engine (`EdgeClient`) owns the protocol, the model and the training loop. It asks for what only a browser has by
// calling `perform` with an action; `actions` below has one function for each. `page.js` lists the page's messages.

import init, { EdgeClient, openDevice, readState } from './sflllm.js';
import { fetchBlob, fetchFile, forgetBlob } from './blob.js';
import { readExamples } from './codec.js';
import { Slot } from './slot.js';

// Demo text is dealt out in this many parts, so that tabs on one text still bring different examples.
const DEMO_PARTS = 4;
// A device that keeps being lost is no use.
const MOST_RESTARTS = 2;

const say = (type, fields = {}) => postMessage({ type, ...fields });
const show = (state, message, advice = {}) => say('state', { state, message, ...advice });

let wasm = null;
let memory = null;
let gpu = null;
let run = null;
// What an earlier visit left, until it is gone on with or forgotten.
let left = null;

// ---- the device ---------------------------------------------------------------------------------------------------

async function loadEngine() {
  wasm ??= init({ module_or_path: new URL('./sflllm_bg.wasm', import.meta.url) });
  ({ memory } = await wasm);
}

async function adapterName() {
  const adapter = await navigator.gpu.requestAdapter({ powerPreference: 'high-performance' }).catch(() => null);
  if (!adapter) return null;
  const { vendor, architecture, description, isFallbackAdapter } = adapter.info ?? {};
  const words = [vendor, architecture].filter(Boolean).join(' ');
  const name = description && words ? `${description} (${words})` : description || words || 'a GPU';
  return isFallbackAdapter ? `${name}, emulated on the CPU` : name;
}

// Finds a device the model can run on; otherwise says what is missing, first things first.
async function diagnose() {
  await loadEngine();
  if (!self.isSecureContext) return { failed: 'secure', device: 'CPU' };
  if (!navigator.gpu) return { failed: 'webgpu', device: 'CPU' };
  const name = await adapterName();
  if (!name) return { failed: 'adapter', device: 'CPU' };
  try {
    gpu = { device: await openDevice('gpu'), name };
  } catch (error) {
    return { failed: 'limits', device: 'CPU', detail: String(error.message ?? error) };
  }
  return { failed: null, device: name };
}

async function chosenDevice(engine) {
  await loadEngine();
  if (engine === 'cpu') return { device: await openDevice('cpu'), name: 'CPU (WebAssembly)' };
  if (!gpu) {
    const { failed, detail } = await diagnose();
    if (failed) throw new Error(detail || 'this browser offers no GPU; choose “CPU” under Options');
  }
  // A device that was lost cannot be used again: the next run asks for a new one.
  const chosen = gpu;
  gpu = null;
  return chosen;
}

// ---- one run ------------------------------------------------------------------------------------------------------

class Run {
  constructor(wish, slot, restarts) {
    const { token, name, engine, source } = wish;
    Object.assign(this, { wish, slot, restarts, token, name, engine, source });
    this.sockets = [null, null];
    this.timer = 0;
    this.sent = 0;
    this.received = 0;
    this.lastStep = 0;
    this.trafficDue = false;
    this.loading = null;
    // Open until the end, since the engine reads from them; by hash.
    this.files = new Map();
    this.prepared = false;
    this.leaving = false;
    this.state = 'connecting';
  }

  async start() {
    const { device, name } = await chosenDevice(this.engine);
    say('device', { device: name });
    // Only what was to be stored has an answer.
    const perform = (action) => (run === this ? this.actions[action.type](action) : undefined);
    const kept = this.slot?.bytes ?? undefined;
    this.client = new EdgeClient(device, this.name, name, this.token, Boolean(this.slot), kept, perform);
    this.client.start();
  }

  show(state, message) {
    this.state = state;
    show(state, message);
  }

  // The place in the run is kept for a page that is only loaded again, and given up by a person who leaves.
  leave() {
    this.leaving = true;
    if (this.client) this.client.leave();
    else {
      this.end();
      show('idle', 'Left before joining');
    }
  }

  end(next) {
    if (run === this) run = null;
    clearTimeout(this.timer);
    if (!next) {
      if (this.leaving) this.forget();
      else this.slot?.close();
    }
    this.loading?.abort();
    for (const socket of this.sockets) socket?.close();
    for (const file of this.files.values()) file.close();
    this.reportTraffic();
    // The engine may still be inside a call that led here.
    setTimeout(() => {
      this.client?.free();
      this.client = null;
    });
  }

  forget() {
    say('kept', { slot: null });
    this.slot?.forget();
    this.slot = null;
  }

  // `keeps` is whether there is a way back.
  fail(title, remedy, keeps = false) {
    this.leaving = !keeps;
    this.end();
    show('error', title, { title, remedy });
  }

  count(sent, received) {
    this.sent += sent;
    this.received += received;
    if (this.trafficDue) return;
    this.trafficDue = true;
    setTimeout(() => this.reportTraffic(), 250);
  }

  reportTraffic() {
    this.trafficDue = false;
    say('traffic', { sent: this.sent, received: this.received });
    if (!this.client) return;
    // On the CPU the buffers are in the engine's memory.
    say('held', { memory: memory.buffer.byteLength, gpu: this.engine === 'cpu' ? 0 : this.client.bufferBytes() });
  }

  // What the engine asks for. Endpoint 0 is the main server, 1 the federated server.
  actions = {
    connect: ({ endpoint, url }) => this.connect(endpoint, url),
    send: ({ endpoint, bytes }) => {
      const socket = this.sockets[endpoint];
      if (socket?.readyState !== WebSocket.OPEN) return;
      socket.send(bytes);
      this.count(bytes.length, 0);
    },
    close: ({ endpoint }) => this.sockets[endpoint]?.close(),
    timer: ({ milliseconds }) => {
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.client.timeout(), milliseconds);
    },
    // Keeps what it takes to come back; the answer is what went wrong.
    store: ({ bytes }) => this.slot?.store(bytes),
    forget: () => this.forget(),
    admitted: ({ client, again }) => {
      say('member', { client });
      if (!this.prepared) this.show(this.state, again ? 'Back in the run' : 'In the run');
    },
    // What was kept, the text too, was for another run: a person decides whether it is for this one.
    otherRun: () => {
      this.other = true;
      setTimeout(() => this.leave());
    },
    note: ({ message }) => say('note', { message }),
    lost: ({ message }) => this.show('connecting', message),
    plan: ({ rounds, localSteps }) => say('plan', { rounds, localSteps }),
    fetch: (wanted) => {
      // A newer assignment replaces one that is still being loaded.
      this.loading?.abort();
      this.prepared = false;
      const loading = (this.loading = new AbortController());
      this.load(wanted, loading.signal).catch((error) => {
        if (run !== this || loading.signal.aborted) return;
        // A server that cannot be reached now may be in a while.
        const mayPass = Boolean(error.passes);
        this.client.notFetched(String(error.message ?? error), mayPass);
      });
    },
    waiting: () => {
      this.prepared = true;
      this.show('waiting', 'In the run; waiting for the next round to begin');
    },
    round: ({ round, members }) => {
      say('members', { count: members });
      this.lastStep = performance.now();
      this.show('training', `Round ${round} begins`);
    },
    step: ({ round, step, loss, tokens }) => {
      const now = performance.now();
      if (this.state !== 'training') this.show('training', `Round ${round} goes on`);
      say('step', { round, step, loss, tokensPerSecond: (1000 * tokens) / Math.max(1, now - this.lastStep) });
      this.lastStep = now;
    },
    result: ({ round, step, members, validLoss, validPerplexity }) => {
      if (members > 0) say('members', { count: members });
      say('round', { round, step, validLoss, validPerplexity });
    },
    finished: ({ message, completed }) => {
      this.end();
      if (completed) show('done', message);
      else show('idle', this.other ? 'The server has another run by now; join to take part in that' : message);
    },
    failed: ({ title, remedy, keeps }) => this.fail(title, remedy, keeps),
    deviceLost: ({ message }) => {
      if (this.restarts >= MOST_RESTARTS) {
        this.fail('The GPU was lost', message);
        return;
      }
      this.end(true);
      show('connecting', 'The GPU was lost; starting again on a new one');
      begin(this.wish, this.slot, this.restarts + 1);
    },
  };

  connect(endpoint, url) {
    const path = endpoint === 0 ? '/main' : '/federated';
    const address = new URL(path, url || self.location.origin);
    address.protocol = address.protocol === 'http:' || address.protocol === 'ws:' ? 'ws:' : 'wss:';
    const socket = new WebSocket(address);
    const current = () => run === this && this.sockets[endpoint] === socket;
    socket.binaryType = 'arraybuffer';
    socket.onopen = () => {
      if (!current()) return;
      if (endpoint === 0 && this.prepared) this.show('waiting', 'Back in touch with the server; waiting for the next round to begin');
      this.client.connected(endpoint);
    };
    socket.onclose = () => {
      if (!current()) return;
      this.sockets[endpoint] = null;
      this.client.disconnected(endpoint);
    };
    socket.onmessage = ({ data }) => {
      if (!current() || !(data instanceof ArrayBuffer)) return;
      this.count(0, data.byteLength);
      this.client.frame(endpoint, new Uint8Array(data));
    };
    const previous = this.sockets[endpoint];
    this.sockets[endpoint] = socket;
    previous?.close();
  }

  // Fetches the weights and the tokenizer that the engine lacks, reads the text unless it has it, and tells it when everything
  // is there.
  async load({ weights, tokenizer, needsText, endToken }, signal) {
    const total = [...weights, ...tokenizer].reduce((sum, blob) => sum + blob.bytes, 0);
    let done = 0;
    this.show('loading', 'Loading the model');
    const progress = {
      onBytes: (count) => {
        done += count;
        say('loading', { done, total });
      },
      onWire: (count) => this.count(0, count),
      bearer: () => this.client.bearer(),
      signal,
    };
    const fetchChecked = async (blob, check) => {
      const bytes = await fetchBlob(blob, progress);
      signal.throwIfAborted();
      try {
        check(bytes);
      } catch (error) {
        await forgetBlob(blob);
        throw error;
      }
      return bytes;
    };
    let tokenizerFile = null;
    for (const blob of tokenizer) tokenizerFile = await fetchChecked(blob, (bytes) => this.client.checkTokenizer(bytes));
    for (const blob of weights) {
      // Of the embedding only the rows of a step's tokens are needed at a time.
      if (blob.name === 'embedding' && (await this.loadStored(blob, progress))) continue;
      await fetchChecked(blob, (bytes) => this.client.loadWeights(bytes));
    }
    if (needsText) await this.readText(tokenizerFile, endToken, signal);
    this.show('loading', 'Preparing the device');
    this.client.fetched();
  }

  // Lets the engine read a part of the weights from a file, which is fetched anew if it is damaged. If that does not help, or there
  // are no files here, the answer is false: the part can still be had in memory.
  async loadStored(blob, progress, anew = false) {
    const open = this.files.get(blob.sha256);
    const file = open ?? (await fetchFile(blob, progress));
    if (!file) return false;
    if (open) progress.onBytes(blob.bytes);
    this.files.set(blob.sha256, file);
    try {
      progress.signal.throwIfAborted();
      this.client.loadStored(file);
      return true;
    } catch {
      file.close();
      this.files.delete(blob.sha256);
      progress.signal.throwIfAborted();
      progress.onBytes(-blob.bytes);
      await forgetBlob(blob);
      return !anew && this.loadStored(blob, progress, true);
    }
  }

  async readText(tokenizerFile, endToken, signal) {
    this.show('loading', 'Reading the text');
    const { name, bytes } = await this.readSource(signal);
    const reader = this.client.readData(bytes, name);
    try {
      const progress = (done, total) => {
        signal.throwIfAborted();
        say('loading', { done, total, unit: 'texts' });
      };
      await readExamples(reader, tokenizerFile, endToken, progress);
      signal.throwIfAborted();
    } catch (error) {
      reader.free();
      throw error;
    }
    this.client.takeData(reader);
  }

  async readSource(signal) {
    if (this.source.kind === 'file') {
      return { name: this.source.file.name, bytes: new Uint8Array(await this.source.file.arrayBuffer()) };
    }
    const response = await fetch('/demo/train.txt', { signal });
    if (!response.ok) throw new Error(`the server has no demo text (${response.status}); choose a file instead`);
    const text = await response.text();
    const lines = text.split('\n').filter((line, index) => line && index % DEMO_PARTS === this.source.part);
    this.count(0, text.length);
    return { name: 'the demo text', bytes: new TextEncoder().encode(lines.join('\n')) };
  }
}

// ---- the page -----------------------------------------------------------------------------------------------------

// Goes on with what an earlier visit left, or begins anew.
async function join({ resume, ...wish }) {
  await looked;
  // This tab's own, at once; what another has left, when a person says so.
  const found = resume && (resume === 'left' || left?.own) ? left : null;
  if (found) {
    left = null;
    const kept = found.wish;
    return begin({ ...kept, token: wish.token || kept.token, engine: wish.engine === 'cpu' ? 'cpu' : kept.engine }, found.slot, 0);
  }
  if (resume) left?.slot.close();
  else await left?.slot.forget();
  left = null;
  if (wish.source.kind === 'demo') wish.source.part = Math.floor(Math.random() * DEMO_PARTS);
  return begin(wish, await Slot.begin(wish), 0);
}

async function begin(wish, slot, restarts) {
  run?.end();
  const started = (run = new Run(wish, slot, restarts));
  say('kept', { slot: slot?.id ?? null });
  try {
    await started.start();
  } catch (error) {
    if (run === started) started.fail('This device could not be used', String(error.message ?? error));
  }
}

// What an earlier visit left; `slot` is what this tab had before it was loaded again.
let looked = null;
async function look({ slot }) {
  await loadEngine();
  const damaged = () => say('note', { message: 'What this page had kept of a run was damaged; it joins as a new one' });
  left = await Slot.find(slot, readState, damaged).catch(() => null);
  if (left) say('left', { own: left.own, client: left.slot.kept.client, round: left.slot.kept.round });
}

const requests = {
  look: (message) => (looked = look(message)),
  diagnose: async () => say('diagnosis', await diagnose()),
  join,
  leave: async () => run?.leave(),
  // The page goes away, perhaps to come back.
  hide: async () => run?.client?.leave(),
};

self.onmessage = ({ data }) => {
  requests[data.type](data).catch((error) => {
    show('error', 'The engine stopped', { title: 'The engine stopped', remedy: `Reload the page and join again. (${error.message ?? error})` });
  });
};
