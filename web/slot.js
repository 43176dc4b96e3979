// What a tab keeps of a run, so that a reload goes on where it was: who it is there (the engine's bytes), with the join code, the
// choices and the text. A slot is a directory of the browser's private file system that one tab at a time has. Browsers without
// one, and private windows, keep nothing, and everything else works.

const DIRECTORY = 'sflllm-clients';
// The two take turns, so that a crash while one is written leaves the other.
const SIDES = ['a.state', 'b.state'];
const WISH = 'wish.json';
const TEXT = 'text';
// A text that is larger is not copied.
const MOST_TEXT = 64 << 20;
// A tab that is loaded again comes before its former self has let go of its files.
const PATIENCE = 5000;
const HEAD = 4;

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

async function openDirectory() {
  try {
    const root = await navigator.storage?.getDirectory?.();
    return (await root?.getDirectoryHandle(DIRECTORY, { create: true })) ?? null;
  } catch {
    return null;
  }
}

async function write(directory, name, bytes) {
  const file = await directory.getFileHandle(name, { create: true });
  const handle = await file.createSyncAccessHandle();
  try {
    handle.truncate(0);
    if (handle.write(bytes, { at: 0 }) !== bytes.length) throw new Error('the browser has no room for it');
    handle.flush();
  } finally {
    handle.close();
  }
}

async function read(directory, name) {
  const file = await (await directory.getFileHandle(name)).getFile();
  return new Uint8Array(await file.arrayBuffer());
}

export class Slot {
  constructor(id, directory, sides) {
    Object.assign(this, { id, directory, sides, number: 0, bytes: null });
  }

  // Takes a slot, a new one where there is none of that name; null where another tab has it, or the browser has no files.
  static async open(id, patience = 0) {
    const sides = [];
    try {
      const directory = await (await openDirectory())?.getDirectoryHandle(id, { create: true });
      if (!directory) return null;
      for (const name of SIDES) {
        const file = await directory.getFileHandle(name, { create: true });
        if (!file.createSyncAccessHandle) return null;
        for (let waited = 0; ; waited += 100) {
          try {
            sides.push(await file.createSyncAccessHandle());
            break;
          } catch (error) {
            if (waited >= patience) throw error;
            await pause(100);
          }
        }
      }
      return new Slot(id, directory, sides);
    } catch {
      for (const side of sides) side.close();
      return null;
    }
  }

  // A slot for a run that begins, which keeps the join code, the choices and the text; null where that cannot be kept.
  static async begin({ token, name, engine, source }) {
    if (!self.isSecureContext) return null;
    if (source.kind === 'file' && source.file.size > MOST_TEXT) return null;
    const slot = await Slot.open(crypto.randomUUID());
    if (!slot) return null;
    try {
      const { kind, part } = source;
      if (kind === 'file') await write(slot.directory, TEXT, new Uint8Array(await source.file.arrayBuffer()));
      const wish = { token, name, engine, source: { kind, part, name: source.file?.name } };
      await write(slot.directory, WISH, new TextEncoder().encode(JSON.stringify(wish)));
      return slot;
    } catch {
      await slot.forget();
      return null;
    }
  }

  // The slot that this tab had before it was loaded again, or one that another tab has left; with what was wished for. `judge`
  // throws for bytes that cannot be gone on with; where this tab's own are such, `damaged` is called.
  static async find(own, judge, damaged) {
    const directory = await openDirectory();
    if (!directory) return null;
    const ids = [];
    for await (const id of directory.keys()) ids.push(id);
    ids.sort((left, right) => (right === own) - (left === own));
    for (const id of ids) {
      const slot = await Slot.open(id, id === own ? PATIENCE : 0);
      if (!slot) continue;
      const wish = await slot.load(judge);
      if (wish) return { slot, wish, own: id === own };
      // What cannot be used is in nobody's way any more.
      if (id === own && slot.number > 0) damaged();
      await slot.forget();
    }
    return null;
  }

  // What is in the slot: the newer of the two sides that `judge` lets pass, and the wish. Null when nothing can be gone on with.
  async load(judge) {
    const found = this.sides.map((side) => {
      const bytes = new Uint8Array(side.getSize());
      side.read(bytes, { at: 0 });
      const number = bytes.length > HEAD ? new DataView(bytes.buffer).getUint32(0, true) : 0;
      return { number, bytes: bytes.slice(HEAD) };
    });
    found.sort((left, right) => right.number - left.number);
    this.number = found[0].number;
    for (const { number, bytes } of found) {
      try {
        this.kept = judge(bytes);
        this.bytes = bytes;
        // The other side is written next, be it a newer one that is damaged.
        this.number = number;
        const wish = JSON.parse(new TextDecoder().decode(await read(this.directory, WISH)));
        if (wish.source.kind === 'file') wish.source.file = new File([await read(this.directory, TEXT)], wish.source.name);
        return wish;
      } catch {
        // The other side may be whole.
      }
    }
    return null;
  }

  // Keeps the engine's bytes. Returns what went wrong, if something did.
  store(bytes) {
    try {
      const number = this.number + 1;
      const side = this.sides[number % 2];
      const whole = new Uint8Array(HEAD + bytes.length);
      new DataView(whole.buffer).setUint32(0, number, true);
      whole.set(bytes, HEAD);
      side.truncate(whole.length);
      if (side.write(whole, { at: 0 }) !== whole.length) return 'the browser has no room for it';
      side.flush();
      this.number = number;
      this.bytes = bytes;
      return undefined;
    } catch (error) {
      return String(error.message ?? error);
    }
  }

  // Lets another tab have it.
  close() {
    for (const side of this.sides) side.close();
    this.sides = [];
  }

  async forget() {
    this.close();
    // It may be gone already.
    await (await openDirectory())?.removeEntry(this.id, { recursive: true }).catch(() => {});
  }
}
