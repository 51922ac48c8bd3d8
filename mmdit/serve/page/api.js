// The server, by its public interface alone.

const KEY = "mmdit.key";
let askForKey = async () => false;

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export const hasKey = () => Boolean(key());

function key() {
  try {
    return sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY);
  } catch {
    return null; // a browser that keeps nothing
  }
}

export function keepKey(value, long) {
  try {
    for (const store of [sessionStorage, localStorage]) store.removeItem(KEY);
    if (value) (long ? localStorage : sessionStorage).setItem(KEY, value);
  } catch {
    // as above
  }
}

// What is called where the server wants a key: it resolves to whether there is another one now.
export function whenAsked(call) {
  askForKey = call;
}

// An answer that is one of success; else a ServerError with the server's own words.
export async function ask(path, options = {}) {
  for (;;) {
    const headers = { ...options.headers };
    if (key()) headers.authorization = `Bearer ${key()}`;
    let answer;
    try {
      answer = await fetch(path, { ...options, headers, cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The server does not answer. Is it still there?", 0);
    }
    if (answer.ok) return answer;
    if (answer.status === 401 && (await askForKey())) continue;
    const told = await answer.json().catch(() => ({}));
    throw new ServerError(told.error?.message ?? told.detail ?? `The server answers ${answer.status}.`, answer.status);
  }
}

const json = async (path, options) => (await ask(path, options)).json();

export const model = async () => (await json("v1/models")).data[0];
export const samplers = () => json("sdapi/v1/samplers");
export const schedules = () => json("sdapi/v1/schedulers");

// The settings that a picture's file names.
export async function settingsIn(blob) {
  const reader = new FileReader();
  const image = await new Promise((done, fail) => {
    reader.onload = () => done(reader.result);
    reader.onerror = () => fail(new Error("The file cannot be read."));
    reader.readAsDataURL(blob);
  });
  const said = JSON.stringify({ image });
  return (await json("sdapi/v1/png-info", { method: "POST", body: said })).parameters;
}

// Draw: gives { step, steps }, { blob } of pictures to come, { blob, seed, maps, done }, each with `index`.
// wish: the request's fields. pictures: image and mask as blobs, or null.
export async function* draw(wish, pictures, signal) {
  const asked = { ...wish, stream: true };
  let path = "v1/images/generations";
  let body = JSON.stringify(asked);
  if (pictures?.image) {
    path = "v1/images/edits";
    body = new FormData();
    for (const [name, value] of Object.entries(asked)) body.append(name, String(value));
    for (const [name, blob] of Object.entries(pictures)) if (blob) body.append(name, blob, `${name}.png`);
  }
  const answer = await ask(path, { method: "POST", body, signal });
  let left = wish.n ?? 1;
  for await (const block of blocks(answer.body)) {
    if (block.startsWith(":")) {
      const told = /picture (\d+): step (\d+) of (\d+)/.exec(block);
      if (told) yield { index: Number(told[1]), step: Number(told[2]), steps: Number(told[3]) };
      continue;
    }
    const event = JSON.parse(block.slice("data: ".length));
    if (event.error) throw new ServerError(event.error.message, 500);
    const blob = blobOf(event.b64_json, `image/${event.output_format}`);
    const index = event.index ?? 0;
    if (event.type.endsWith(".completed")) {
      const maps = Object.entries(event.attention_maps ?? {}).map(([word, text]) => [word, blobOf(text, "image/png")]);
      left -= 1;
      yield { index, blob, seed: event.seed, maps: Object.fromEntries(maps), done: true };
    } else {
      yield { index, blob };
    }
  }
  if (left > 0) throw new ServerError("The server ended its answer before all pictures were there.", 0);
}

// The blocks of a stream of events, which an empty line ends.
async function* blocks(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let parts = [];
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    parts.push(value);
    if (!value.includes("\n")) continue; // pictures come in many parts
    const found = parts.join("").split("\n\n");
    parts = [found.pop()];
    yield* found;
  }
}

function blobOf(text, type) {
  return new Blob([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))], { type });
}
