// Files that the server names by the SHA-256 of their contents: fetched once, resumed where a connection broke, and kept
// in the browser's cache where it lets us. Whoever uses the bytes checks their hash; this module only carries them.

const CACHE = 'sflllm-blobs';
const TRIES = 5;

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

// Private windows and insecure addresses have no cache, or one that refuses.
async function openCache() {
  try {
    return (await self.caches?.open(CACHE)) ?? null;
  } catch {
    return null;
  }
}

async function keep(cache, url, bytes) {
  try {
    const { quota = 0, usage = 0 } = (await navigator.storage?.estimate?.()) ?? {};
    if (quota - usage < 2 * bytes.length) {
      for (const old of await cache.keys()) await cache.delete(old);
    }
    await cache.put(url, new Response(bytes, { headers: { 'content-length': String(bytes.length) } }));
  } catch {
    // Out of space: the next visit fetches again.
  }
}

// Reads the rest of `url` into `bytes` from `offset` on; returns how far it got.
async function readFrom(url, bytes, offset, onBytes, signal) {
  const response = await fetch(url, { signal, headers: offset > 0 ? { range: `bytes=${offset}-` } : {} });
  if (response.status !== (offset > 0 ? 206 : 200)) {
    // A server that ignores the range starts again at the beginning.
    if (!(offset > 0 && response.status === 200)) {
      const error = new Error(`the server answered ${response.status} for ${url}`);
      error.final = response.status >= 400 && response.status < 500;
      throw error;
    }
    onBytes(-offset);
    offset = 0;
  }
  const reader = response.body.getReader();
  let at = offset;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return at;
      if (at + value.length > bytes.length) {
        const error = new Error(`the server sent more than the ${bytes.length} bytes it announced for ${url}`);
        error.final = true;
        throw error;
      }
      bytes.set(value, at);
      at += value.length;
      onBytes(value.length);
    }
  } catch (error) {
    error.reached = at;
    throw error;
  }
}

// The bytes of `{sha256, bytes}`. `onBytes(count)` hears of progress, `onWire(count)` of what came over the network.
export async function fetchBlob({ sha256, bytes: size }, { onBytes, onWire, signal }) {
  const url = `/weights/${sha256}`;
  const cache = await openCache();
  const cached = await cache?.match(url).catch(() => undefined);
  if (cached) {
    const bytes = new Uint8Array(await cached.arrayBuffer());
    if (bytes.length === size) {
      onBytes(size);
      return bytes;
    }
    await cache.delete(url);
  }
  const bytes = new Uint8Array(size);
  const count = (arrived) => {
    onBytes(arrived);
    if (arrived > 0) onWire(arrived);
  };
  let at = 0;
  for (let attempt = 1; at < size; attempt += 1) {
    try {
      at = await readFrom(url, bytes, at, count, signal);
      if (at < size) throw new Error(`the connection ended after ${at} of ${size} bytes of ${url}`);
    } catch (error) {
      at = error.reached ?? at;
      if (error.final || signal.aborted || attempt >= TRIES) throw error;
      await pause(500 * 2 ** attempt);
    }
  }
  if (cache) await keep(cache, url, bytes);
  return bytes;
}

// Takes a blob whose contents turned out wrong out of the cache.
export async function forgetBlob({ sha256 }) {
  await (await openCache())?.delete(`/weights/${sha256}`);
}
