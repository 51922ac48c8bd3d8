// The page: what happens when.

import * as api from "./api.js";
import { $, addressOf, forget, h, icon, sure, toBlob } from "./dom.js";
import * as form from "./form.js";
import * as history from "./history.js";
import { Painter } from "./mask.js";
import * as stage from "./stage.js";

const EXAMPLES = {
  demo: ["a horse and a bear on a green background", "a blue fox", "a robot, a snail and a panda"],
  other: ["a lighthouse in a storm, oil on canvas", "a red fox asleep in fresh snow", "a small bookshop at night, warm light"],
};
const THUMB = 192; // pixels
const PATIENCE = 2000; // ms between two looks whether the model is there

let model = null;
let entries = []; // of the history, the newest first
let shown = []; // of these, what is on the wall
let drawing = null; // what aborts it
let painted = null; // while a mask is painted: what takes it
const chosen = new Set(); // numbers of pictures to compare

// ---- telling -----------------------------------------------------------------------------------

const say = (text) => { $("status").textContent = text; };

function trouble(error) {
  $("trouble").textContent = error?.message ?? "";
  $("trouble").hidden = !error;
}

const careful = (call) => async (...given) => {
  try {
    await call(...given);
  } catch (error) {
    trouble(error);
  }
};

// ---- the server --------------------------------------------------------------------------------

api.whenAsked(() => new Promise((done) => {
  const dialog = $("key-dialog");
  $("key-open").hidden = false;
  if (!dialog.open) {
    dialog.returnValue = ""; // Escape leaves what was returned before
    dialog.showModal();
  }
  dialog.addEventListener("close", () => done(dialog.returnValue === "given"), { once: true });
}));

$("key-form").addEventListener("submit", () => {
  api.keepKey($("key").value.trim(), $("key-keep").checked);
  $("key").value = "";
  $("key-dialog").returnValue = "given";
  queueMicrotask(() => $("key-dialog").close("given"));
});
$("key-later").addEventListener("click", () => $("key-dialog").close(""));
$("key-open").addEventListener("click", () => {
  api.keepKey("");
  meet();
});

async function meet() {
  try {
    const found = await api.model();
    if (!found.defaults) {
      $("model").textContent = `${found.id} is being loaded…`;
      setTimeout(meet, PATIENCE);
      return;
    }
    $("model").textContent = found.id;
    $("key-open").hidden = !api.hasKey();
    if (model === null) {
      const [samplers, schedules] = await Promise.all([api.samplers(), api.schedules()]);
      form.learn(found);
      form.choices("sampler", samplers.map((one) => [one.aliases[0], one.name]));
      form.choices("schedule", schedules.map((one) => [one.name, one.label]));
      model = found;
      if (entries.length === 0 && shown.length === 0) nothing();
    }
    trouble(null);
    $("draw").disabled = false;
  } catch (error) {
    const refused = error.status >= 400 && error.status < 500;
    $("model").textContent = error.status === 401 ? "It needs a key" : refused ? "The server refuses" : "The server does not answer";
    if (refused) trouble(error);
    else setTimeout(meet, PATIENCE);
  }
}

// ---- drawing -----------------------------------------------------------------------------------

async function draw() {
  if (drawing || $("draw").disabled || !form.valid()) return;
  painted?.();
  trouble(null);
  const set = form.read();
  const begin = form.beginning();
  const size = set.width === null ? begin : set;
  const found = [];
  drawing = new AbortController();
  busy(true);
  say(set.count === 1 ? "Drawing." : `Drawing ${set.count} pictures.`);
  const coming = stage.coming(set.count, size.width / size.height, size.width);
  const pace = new Pace(set.count);
  if (matchMedia("(max-width: 860px)").matches) $("stage").scrollIntoView({ block: "start" });
  const glances = [];
  try {
    const mask = begin?.mask ? await begin.mask.mask() : null;
    const pictures = begin && { image: begin.blob, mask };
    for await (const event of api.draw(form.wish(set), pictures, drawing.signal)) {
      if (event.step) {
        coming.step(event.index, event.step, event.steps, pace.step(event));
      } else {
        coming.glance(event.index, event.blob, Boolean(event.done));
        if (event.done) found.push(await keep(event, set, begin));
        else glances.push(event.blob);
      }
    }
    say(found.length === 1 ? "Done. 1 picture." : `Done. ${found.length} pictures.`);
  } catch (error) {
    if (error.name === "AbortError") say("Cancelled.");
    else trouble(error);
  } finally {
    drawing = null;
    busy(false);
    glances.forEach(forget);
  }
  found.sort((a, b) => a.seed - b.seed);
  show(found.length ? found : shown.filter((entry) => entries.includes(entry)));
}

function busy(on) {
  const focused = [$("draw"), $("cancel")].includes(document.activeElement);
  $("draw").hidden = on;
  $("cancel").hidden = !on;
  $("progress").hidden = !on;
  $("stage").setAttribute("aria-busy", String(on));
  if (focused) $(on ? "cancel" : "draw").focus();
  showChosen();
  if (!on) document.title = "mmdit";
  else $("progress").removeAttribute("value");
}

// How far it is, told now and then; a step gives the seconds that are left.
class Pace {
  constructor(count) {
    [this.count, this.steps, this.quarter, this.since] = [count, new Map(), 0, null];
  }

  step({ index, step, steps }) {
    this.since ??= performance.now();
    this.steps.set(index, step / steps);
    const share = [...this.steps.values()].reduce((sum, each) => sum + each, 0) / this.count;
    const percent = Math.round(100 * share);
    $("progress").value = share;
    document.title = `${percent} % · mmdit`;
    const left = ((performance.now() - this.since) / 1000) * (1 / share - 1);
    if (Math.floor(4 * share) > this.quarter && share < 1) {
      this.quarter = Math.floor(4 * share);
      say(`${percent} percent${left < 2 ? "" : `, about ${Math.round(left)} seconds left`}.`);
    }
    return left;
  }
}

async function keep({ blob, seed, maps }, set, begin) {
  const image = await createImageBitmap(blob);
  const { count, width, height, seed: asked, ...settings } = set;
  const entry = {
    id: Math.max(Date.now(), (entries[0]?.id ?? 0) + 1), blob, seed, maps, settings, model: model.id,
    width: image.width, height: image.height, thumb: await thumb(image),
  };
  if (begin) settings.from = begin.mask ? "a picture and a mask" : "a picture";
  image.close();
  const { kept, gone } = await history.add(entry, entries);
  entries = [entry, ...entries.filter((other) => !gone.includes(other.id))];
  if (!kept) trouble(new Error("The browser keeps no pictures here: save those that you want to have."));
  strip();
  return entry;
}

async function thumb(image) {
  const scale = Math.min(1, THUMB / Math.min(image.width, image.height));
  const canvas = h("canvas", { width: Math.round(image.width * scale), height: Math.round(image.height * scale) });
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return toBlob(canvas, "image/webp", 0.85);
}

// ---- the wall ----------------------------------------------------------------------------------

function nothing() {
  stage.empty(EXAMPLES[model?.id === "demo" ? "demo" : "other"], (text) => {
    form.fill({ prompt: text });
    draw();
  });
}

function show(some) {
  painted?.();
  shown = some;
  $("reuse").disabled = some.length === 0;
  if (some.length === 0) nothing();
  else if (some.length > 1) stage.several(some, (entry) => show([entry]));
  else stage.one(some[0], actions(some[0]));
  for (const button of $("strip").querySelectorAll(".thumb")) {
    if (some.some((entry) => String(entry.id) === button.dataset.id)) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
}

const actions = (entry) => ({
  restore: () => {
    restore({ ...entry.settings, width: entry.width, height: entry.height, seed: entry.seed, attention_maps: entry.settings.words });
  },
  begin: careful(() => begin(entry.blob)),
  paint: careful(async () => {
    await begin(entry.blob);
    paint();
  }),
  remove: async () => {
    if (!(await sure("Delete this picture? It is nowhere else unless you saved it."))) return;
    await history.remove(entry.id);
    for (const blob of [entry.blob, entry.thumb]) forget(blob);
    const place = entries.indexOf(entry);
    entries = entries.filter((other) => other !== entry);
    chosen.delete(entry.id);
    strip();
    show(entries.slice(Math.min(place, entries.length - 1)).slice(0, 1));
    say("Deleted.");
  },
});

function restore(settings) {
  form.fill({ negative: "", sampler: "", schedule: "", words: "", count: 1, ...settings });
  say("Settings restored.");
  $("prompt").focus({ preventScroll: matchMedia("(min-width: 861px)").matches });
}

async function begin(blob) {
  const leave = painted !== null;
  painted = null; // the mask was of another picture
  await form.setBeginning(blob);
  if (leave) show(shown);
  say(blob ? "The next picture begins with this one." : "The next picture begins with noise.");
}

function paint() {
  const found = form.beginning();
  if (drawing || !found) return;
  const painter = found.mask ?? new Painter(found.blob, found.width, found.height);
  painted = () => {
    painted = null;
    form.setMask(painter);
  };
  stage.painting(painter, (used) => {
    if (used || found.mask) painted();
    painted = null;
    show(shown);
    say(found.mask ? "The mask is used." : "There is no mask.");
    $("prompt").focus({ preventScroll: true });
  });
  $("stage").scrollIntoView({ block: "nearest" });
}

// ---- history -----------------------------------------------------------------------------------

function strip() {
  $("history-count").textContent = entries.length === 0 ? "" : String(entries.length);
  $("clear").hidden = entries.length === 0;
  $("strip").replaceChildren(...(entries.length ? entries.map(item) : [
    h("li", { className: "none", textContent: "What you draw stays here, in this browser alone." })]));
  showChosen();
}

function item(entry) {
  const name = stage.nameOf(entry);
  const box = h("input", {
    type: "checkbox", checked: chosen.has(entry.id), "aria-label": `Compare: ${name}`,
    onchange: () => {
      if (box.checked) chosen.add(entry.id);
      else chosen.delete(entry.id);
      showChosen();
    },
  });
  return h("li", {}, h("button", {
    type: "button", className: "thumb", "data-id": String(entry.id), "aria-label": `Show: ${name}`,
    onclick: () => { if (!drawing) show([entry]); },
  }, h("img", { src: addressOf(entry.thumb), alt: "", loading: "lazy", decoding: "async" })),
  h("label", { className: "pick", title: "Compare" }, box));
}

function showChosen() {
  $("compare").disabled = chosen.size < 2 || drawing !== null;
  $("compare-name").textContent = chosen.size < 2 ? "Compare" : `Compare ${chosen.size}`;
  $("history").classList.toggle("picking", chosen.size > 0);
}

// ---- what the user does ------------------------------------------------------------------------

$("compose").addEventListener("submit", (event) => {
  event.preventDefault();
  draw();
});
$("cancel").addEventListener("click", () => drawing?.abort());
$("compare").addEventListener("click", () => show(entries.filter((entry) => chosen.has(entry.id)).reverse()));
$("clear").addEventListener("click", async () => {
  if (!(await sure(`Delete all ${entries.length} pictures of the history?`, "Delete all"))) return;
  await history.clear();
  entries = [];
  chosen.clear();
  strip();
  if (!drawing) show([]);
  say("The history is empty.");
});
$("reuse").addEventListener("click", () => form.setSeed(shown[0].seed));
$("choose").addEventListener("click", () => $("file").click());
$("restore").addEventListener("click", () => $("restore-file").click());
$("paint").addEventListener("click", paint);
$("begin-remove").addEventListener("click", careful(async () => {
  await begin(null);
  $("choose").focus();
}));

// Every way in which a file comes, and what it is for.
const uses = {
  begin: careful(begin),
  restore: careful(async (file) => {
    const found = await api.settingsIn(file);
    if (Object.keys(found).length === 0) throw new Error("This picture does not say how it was drawn.");
    trouble(null);
    restore(found);
  }),
};
for (const [id, use] of [["file", uses.begin], ["restore-file", uses.restore]]) {
  $(id).addEventListener("change", () => {
    if ($(id).files[0]) use($(id).files[0]);
    $(id).value = "";
  });
}
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((each) => each.type.startsWith("image/"));
  if (file) uses.begin(file);
});

const dragged = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
document.addEventListener("dragenter", (event) => { if (dragged(event)) $("drop").hidden = false; });
document.addEventListener("dragover", (event) => { if (dragged(event)) event.preventDefault(); });
document.addEventListener("dragleave", (event) => { if (event.relatedTarget === null) $("drop").hidden = true; });
document.addEventListener("drop", (event) => {
  $("drop").hidden = true;
  if (!dragged(event)) return;
  event.preventDefault();
  const file = [...event.dataTransfer.files].find((each) => each.type.startsWith("image/"));
  if (file) uses[event.target.closest?.("#drop-restore") ? "restore" : "begin"](file);
});

document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    draw();
  } else if (event.key === "Escape" && drawing) {
    drawing.abort();
  }
});
$("strip").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const every = [...$("strip").querySelectorAll(".thumb")];
  const next = every[every.indexOf(document.activeElement) + step];
  if (step && every.includes(document.activeElement) && next) {
    event.preventDefault();
    next.focus();
    next.click();
  }
});

// ---- begin -------------------------------------------------------------------------------------

form.prepare();
if (/Mac|iP/.test(navigator.platform)) $("draw").querySelector("kbd").textContent = "⌘ ↵";
nothing();
meet();
history.all().then((found) => {
  entries = [...entries, ...found.filter((one) => !entries.some((own) => own.id === one.id))];
  strip();
  if (shown.length === 0 && !drawing && entries.length) show([entries[0]]);
});
