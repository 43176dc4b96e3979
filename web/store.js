// Where this origin keeps what it fetched: the cache, and for what is read piece by piece files of the private file system. Both
// are a convenience: private windows, insecure addresses and old browsers have neither, and everything works without.

const CACHE = 'sflllm-blobs';
const DIRECTORY = 'sflllm';

export async function openCache() {
  try {
    return (await self.caches?.open(CACHE)) ?? null;
  } catch {
    return null;
  }
}

async function openDirectory() {
  try {
    const root = await navigator.storage?.getDirectory?.();
    return (await root?.getDirectoryHandle(DIRECTORY, { create: true })) ?? null;
  } catch {
    return null;
  }
}

// Removes what older runs left when there is no room for `bytes` more. What another tab has open stays.
async function makeRoom(bytes, keep) {
  const { quota = 0, usage = 0 } = (await navigator.storage?.estimate?.()) ?? {};
  if (quota - usage >= 2 * bytes) return;
  const cache = await openCache();
  for (const old of (await cache?.keys()) ?? []) await cache.delete(old);
  const directory = await openDirectory();
  for await (const name of directory?.keys() ?? []) {
    if (name !== keep) await directory.removeEntry(name).catch(() => {});
  }
}

// Keeps `bytes` in the cache, if there is room.
export async function keep(cache, url, bytes) {
  try {
    await makeRoom(bytes.length);
    await cache.put(url, new Response(bytes, { headers: { 'content-length': String(bytes.length) } }));
  } catch {
    // Out of space: the next visit fetches again.
  }
}

// A handle to read the file `name` of `size` bytes with. What is missing of the file is written first, by `fill(write, from)`:
// `from` bytes are there, `write(bytes, at)` puts more. Files grow from the front, so one that is too short is a beginning, and
// stays one when `fill` fails. Null where the file cannot be had, there is no room, or another tab is writing it.
export async function openFile(name, size, fill) {
  const directory = await openDirectory();
  let handle = null;
  let filling = false;
  let unwritable = false;
  const write = (bytes, at) => {
    try {
      if (handle.write(bytes, { at }) === bytes.length) return;
    } catch {
      // As when only a part was written.
    }
    unwritable = true;
    throw Object.assign(new Error('the browser has no room for the file'), { final: true });
  };
  try {
    const file = await directory?.getFileHandle(name, { create: true });
    if (!file?.createSyncAccessHandle) return null;
    if ((await file.getFile()).size !== size) {
      handle = await file.createSyncAccessHandle();
      if (handle.getSize() > size) handle.truncate(0);
      await makeRoom(size - handle.getSize(), name);
      filling = true;
      await fill(write, handle.getSize());
      filling = false;
      handle.flush();
      handle.close();
      handle = null;
    }
    // Several tabs may read at once, where the browser knows of modes; where not, the first has it.
    return await file.createSyncAccessHandle({ mode: 'read-only' });
  } catch (error) {
    handle?.close();
    if (unwritable) await removeFile(name);
    else if (filling) throw error;
    return null;
  }
}

export async function removeFile(name) {
  // It may never have been there.
  await (await openDirectory())?.removeEntry(name).catch(() => {});
}
