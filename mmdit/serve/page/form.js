// The controls: what they say, and what they are told.

import { $, addressOf, h } from "./dom.js";

const SHAPES = [["Square", 1, 1], ["Portrait", 3, 4], ["Landscape", 4, 3], ["Tall", 9, 16], ["Wide", 16, 9]];
const TEXTS = ["prompt", "negative", "words", "sampler", "schedule"];
const NUMBERS = ["width", "height", "steps", "cfg", "strength"];
const STRENGTH = 0.6;
const MASKED = 1; // strength where there is a mask

let multiple = 16;
let begin = null; // { blob, width, height, mask }

// ---- once --------------------------------------------------------------------------------------

export function prepare() {
  for (const name of ["steps", "cfg", "strength"]) {
    $(`${name}-dial`).addEventListener("input", () => { $(name).value = $(`${name}-dial`).value; });
    $(name).addEventListener("input", () => { $(`${name}-dial`).value = $(name).value; });
  }
  for (const name of ["width", "height"]) $(name).addEventListener("input", showShape);
  $("swap").addEventListener("click", () => {
    [$("width").value, $("height").value] = [$("height").value, $("width").value];
    showShape();
  });
  $("seed").addEventListener("input", showDice);
  $("dice").addEventListener("click", () => setSeed(null));
  $("as-picture").addEventListener("change", showSize);
  for (const name of ["prompt", "negative"]) $(name).addEventListener("input", () => grow($(name)));
  setNumber("strength", STRENGTH);
  showStrength();
}

// What the model's own values are, and what a request may be.
export function learn({ defaults, limits }) {
  multiple = limits.multiple;
  const area = defaults.width * defaults.height;
  const shapes = SHAPES.map(([name, across, down]) => {
    const [width, height] = [across / down, down / across].map((ratio) => whole(Math.sqrt(area * ratio), limits.side));
    return { name, width, height, across, down };
  });
  shapes[0] = { ...shapes[0], width: defaults.width, height: defaults.height };
  $("shapes").replaceChildren(...shapes.map((shape) => shapeButton(shape)));
  for (const name of ["width", "height"]) {
    Object.assign($(name), { min: multiple, max: limits.side, step: multiple, value: defaults[name] });
  }
  $("steps").max = limits.steps;
  $("steps-dial").max = Math.min(limits.steps, Math.max(60, defaults.steps));
  $("count").max = limits.pictures;
  setNumber("steps", defaults.steps);
  setNumber("cfg", defaults.cfg);
  showShape();
}

const whole = (side, most) => Math.max(1, Math.min(Math.floor(most / multiple), Math.round(side / multiple))) * multiple;

function shapeButton({ name, width, height, across, down }) {
  const outline = h("span", { className: "outline", "aria-hidden": "true" });
  outline.style.aspectRatio = `${across} / ${down}`;
  outline.style.width = `${20 * Math.min(1, across / down)}px`;
  const input = h("input", { type: "radio", name: "shape", value: `${width}x${height}`, onchange: () => {
    [$("width").value, $("height").value] = [width, height];
  } });
  return h("label", { title: `${width} × ${height}` }, input, outline, h("span", { textContent: name }));
}

export function choices(name, found) {
  for (const [value, text] of found) $(name).append(h("option", { value, textContent: text }));
}

// ---- values ------------------------------------------------------------------------------------

function setNumber(name, value) {
  $(name).value = value;
  if ($(name).validity.stepMismatch) $(name).step = "any"; // pictures may have any number
  $(`${name}-dial`).value = value;
}

export function setSeed(seed) {
  $("seed").value = seed ?? "";
  showDice();
}

function showDice() {
  $("dice").setAttribute("aria-pressed", String($("seed").value === ""));
}

function showShape() {
  const now = `${$("width").value}x${$("height").value}`;
  for (const input of $("shapes").querySelectorAll("input")) input.checked = input.value === now;
}

function showSize() {
  const off = begin !== null && $("as-picture").checked;
  for (const input of $("format").querySelectorAll("input, button")) input.disabled = off;
  $("format").classList.toggle("off", off);
}

// Where it is hidden the browser must not find it wrong.
function showStrength() {
  for (const name of ["strength", "strength-dial"]) $(name).disabled = begin === null;
}

function grow(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}

// What is set: { prompt, negative, width, height, steps, cfg, seed, count, sampler, schedule, words, strength }.
// A seed of null is random; width and height are null where the picture to begin with has them.
export function read() {
  const found = { count: Number($("count").value), seed: $("seed").value === "" ? null : Number($("seed").value) };
  for (const name of TEXTS) found[name] = $(name).value.trim();
  for (const name of NUMBERS) found[name] = Number($(name).value);
  if (begin === null) found.strength = null;
  else if ($("as-picture").checked) found.width = found.height = null;
  return found;
}

// Set what is given; what is not, stays.
export function fill(given) {
  for (const name of TEXTS) if (typeof given[name] === "string") $(name).value = given[name];
  if (typeof given.attention_maps === "string") $("words").value = given.attention_maps;
  for (const name of ["width", "height"]) if (given[name] > 0) $(name).value = whole(given[name], given[name]);
  if (given.count > 0) $("count").value = given.count;
  for (const name of ["steps", "cfg", "strength"]) if (Number.isFinite(given[name])) setNumber(name, given[name]);
  if (Number.isSafeInteger(given.seed)) setSeed(given.seed);
  for (const name of ["prompt", "negative"]) grow($(name));
  showShape();
}

// The fields of a request.
export function wish(set) {
  const asked = { prompt: set.prompt, n: set.count, steps: set.steps, cfg: set.cfg, partial_images: 8 };
  for (const name of ["negative", "sampler", "schedule"]) if (set[name]) asked[name] = set[name];
  for (const name of ["width", "height", "seed", "strength"]) if (set[name] !== null) asked[name] = set[name];
  if (set.words) asked.attention_maps = set.words;
  return asked;
}

// Whether all of it can be; else the browser says what cannot.
export function valid() {
  const wrong = [...$("compose").elements].find((element) => !element.checkValidity());
  if (!wrong) return true;
  const fold = wrong.closest("details");
  if (fold) fold.open = true;
  wrong.reportValidity();
  return false;
}

// ---- the picture to begin with -----------------------------------------------------------------

export const beginning = () => begin;

// blob: null for none. Raises an error for what is no picture.
export async function setBeginning(blob) {
  let found = null;
  if (blob !== null) {
    const image = await createImageBitmap(blob).catch(() => {
      throw new Error("This is no picture that the browser can read.");
    });
    found = { blob, width: image.width, height: image.height, mask: null };
    image.close();
  }
  begin = found;
  $("begin-none").hidden = begin !== null;
  $("begin-some").hidden = begin === null;
  if (begin) $("begin-image").src = addressOf(blob);
  else $("begin-image").removeAttribute("src");
  showMask(null);
  showSize();
  showStrength();
}

// painter: its mask counts from now on; null for none.
export function setMask(painter) {
  const before = begin.mask;
  begin.mask = painter && !painter.empty ? painter : null;
  if (Boolean(before) !== Boolean(begin.mask)) setNumber("strength", begin.mask ? MASKED : STRENGTH);
  showMask(begin.mask);
}

function showMask(painter) {
  const canvas = $("begin-mask");
  canvas.hidden = painter === null;
  $("paint-name").textContent = painter ? "Change the mask" : "Paint a mask";
  if (painter === null) return;
  [canvas.width, canvas.height] = [painter.canvas.width, painter.canvas.height];
  canvas.getContext("2d").drawImage(painter.canvas, 0, 0);
}
