// Pictures that were drawn, with their settings, kept by the browser (IndexedDB): the newest 200, at most 300 MB.

const NAME = "mmdit";
const STORE = "pictures";
const MOST = 200;
const MOST_BYTES = 300e6;

let opened = null;
const here = []; // where the browser keeps nothing

function open() {
  opened ??= new Promise((done, fail) => {
    const asked = indexedDB.open(NAME, 1);
    asked.onupgradeneeded = () => asked.result.createObjectStore(STORE, { keyPath: "id" });
    asked.onsuccess = () => done(asked.result);
    asked.onerror = asked.onblocked = () => fail(asked.error ?? new Error("blocked"));
  });
  return opened;
}

async function act(mode, call) {
  const base = await open();
  return new Promise((done, fail) => {
    const work = base.transaction(STORE, mode);
    const asked = call(work.objectStore(STORE));
    work.oncomplete = () => done(asked.result);
    work.onerror = work.onabort = () => fail(work.error);
  });
}

const sizeOf = (entry) =>
  [entry.blob, entry.thumb, ...Object.values(entry.maps ?? {})].reduce((sum, blob) => sum + (blob?.size ?? 0), 0);

// The newest first. Where nothing can be kept, those of this visit.
export async function all() {
  try {
    return (await act("readonly", (store) => store.getAll())).sort((a, b) => b.id - a.id);
  } catch {
    return [...here];
  }
}

// Returns whether it outlives the page, and which others had to go.
export async function add(entry, others) {
  let [bytes, gone] = [sizeOf(entry), []];
  others.forEach((other, i) => {
    bytes += sizeOf(other);
    if (i + 2 > MOST || bytes > MOST_BYTES) gone.push(other.id);
  });
  try {
    await act("readwrite", (store) => {
      for (const id of gone) store.delete(id);
      return store.put(entry);
    });
    return { kept: true, gone };
  } catch {
    here.unshift(entry);
    return { kept: false, gone: [] };
  }
}

export async function remove(id) {
  try {
    await act("readwrite", (store) => store.delete(id));
  } catch {
    here.splice(0, here.length, ...here.filter((entry) => entry.id !== id));
  }
}

export async function clear() {
  here.length = 0;
  await act("readwrite", (store) => store.clear()).catch(() => null);
}
