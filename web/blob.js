// Files that the server names by the SHA-256 of their contents: fetched once, resumed where a connection broke, and kept
// in the browser where it lets us. Whoever uses the bytes checks their hash; this module only carries them.

import { keep, openCache, openFile, removeFile } from './store.js';

const TRIES = 5;
const PIECE = 1 << 16;

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
const address = ({ sha256 }) => `/weights/${sha256}`;

// A function that reads the next piece of a stream. Where streams can do that all pieces come in one buffer, each until the next is
// read: buffers of their own pile up faster than they are collected.
function pieces(stream) {
  let buffer = new ArrayBuffer(PIECE);
  try {
    const reader = stream.getReader({ mode: 'byob' });
    return async () => {
      const piece = await reader.read(new Uint8Array(buffer));
      buffer = piece.value?.buffer;
      return piece;
    };
  } catch {
    const reader = stream.getReader();
    return () => reader.read();
  }
}

// Reads the rest of `url`, `size` bytes long, from `offset` on into `write(bytes, at)`; returns how far it got.
async function readFrom(url, size, write, offset, onBytes, bearer, options) {
  // The server gives parts of the model to clients of its run.
  const headers = { authorization: `Bearer ${bearer}` };
  if (offset > 0) headers.range = `bytes=${offset}-`;
  const response = await fetch(url, { ...options, headers });
  if (response.status !== (offset > 0 ? 206 : 200)) {
    // A server that ignores the range starts again at the beginning.
    if (!(offset > 0 && response.status === 200)) {
      const error = new Error(`the server answered ${response.status} for ${url}`);
      error.final = response.status >= 400 && response.status < 500 && response.status !== 429;
      // A ticket that is good no more is about to be replaced.
      error.lasts = error.final && response.status !== 401;
      throw error;
    }
    onBytes(-offset);
    offset = 0;
  }
  const read = pieces(response.body);
  let at = offset;
  try {
    for (;;) {
      const { done, value } = await read();
      if (done) return at;
      if (at + value.length > size) {
        const error = new Error(`the server sent more than the ${size} bytes it announced for ${url}`);
        error.final = error.lasts = true;
        throw error;
      }
      write(value, at);
      at += value.length;
      onBytes(value.length);
    }
  } catch (error) {
    error.reached = at;
    throw error;
  }
}

// Fetches a blob from byte `at` on, as often as the connection breaks. `options` are fetch's.
async function fetchRest(blob, write, at, { onBytes, onWire, bearer, signal }, options = {}) {
  const [url, size] = [address(blob), blob.bytes];
  const count = (arrived) => {
    onBytes(arrived);
    if (arrived > 0) onWire(arrived);
  };
  for (let attempt = 1; at < size; attempt += 1) {
    try {
      at = await readFrom(url, size, write, at, count, bearer(), { signal, ...options });
      if (at < size) throw new Error(`the connection ended after ${at} of ${size} bytes of ${url}`);
    } catch (error) {
      at = error.reached ?? at;
      // Whoever asked may ask again, unless that can be no use.
      if (error.final || signal.aborted || attempt >= TRIES) throw Object.assign(error, { passes: !error.lasts });
      await pause(500 * 2 ** attempt);
    }
  }
}

// The bytes of `{sha256, bytes}`. `onBytes(count)` hears of progress, `onWire(count)` of what came over the network.
export async function fetchBlob(blob, progress) {
  const [url, size] = [address(blob), blob.bytes];
  const cache = await openCache();
  const cached = await cache?.match(url).catch(() => undefined);
  if (cached) {
    const bytes = new Uint8Array(await cached.arrayBuffer());
    if (bytes.length === size) {
      progress.onBytes(size);
      return bytes;
    }
    await cache.delete(url);
  }
  const bytes = new Uint8Array(size);
  await fetchRest(blob, (piece, at) => bytes.set(piece, at), 0, progress);
  if (cache) await keep(cache, url, bytes);
  return bytes;
}

// A handle to read a blob with, which is never whole in memory; null where the browser has no files for it. A part that an
// earlier visit fetched is gone on with.
export async function fetchFile(blob, progress) {
  let counted = 0;
  const onBytes = (count) => {
    counted += count;
    progress.onBytes(count);
  };
  const handle = await openFile(blob.sha256, blob.bytes, (write, from) => {
    onBytes(from);
    // The file is the copy that is kept: the browser's own cache need not have another.
    return fetchRest(blob, write, from, { ...progress, onBytes }, { cache: 'no-store' });
  });
  progress.onBytes((handle ? blob.bytes : 0) - counted);
  return handle;
}

// Takes a blob whose contents turned out wrong out of the browser.
export async function forgetBlob(blob) {
  await (await openCache())?.delete(address(blob));
  await removeFile(blob.sha256);
}
