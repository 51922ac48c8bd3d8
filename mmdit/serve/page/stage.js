// What is on the wall: nothing yet, pictures on their way, one picture, several side by side, a mask.

import { $, addressOf, h, icon } from "./dom.js";

const LARGEST = 6; // times its own size that a picture is shown

const TOLD = {
  prompt: "Prompt", negative: "Negative", seed: "Seed", size: "Size", steps: "Steps", cfg: "Guidance",
  sampler: "Solver", schedule: "Noise levels", strength: "Strength", model: "Model", from: "Began with",
};

// What is told of a picture, by name.
export function facts(entry) {
  const found = { ...entry.settings, size: `${entry.width} × ${entry.height}`, seed: entry.seed, model: entry.model };
  return Object.fromEntries(Object.entries(TOLD).flatMap(([name, text]) =>
    found[name] === null || found[name] === undefined || found[name] === "" ? [] : [[text, String(found[name])]]));
}

// Of several pictures' facts those that are not the same in all, each.
export function differences(entries) {
  const every = entries.map(facts);
  const names = [...new Set(every.flatMap(Object.keys))];
  const differ = names.filter((name) => new Set(every.map((one) => one[name])).size > 1);
  return every.map((one) => Object.fromEntries(differ.map((name) => [name, one[name] ?? "–"])));
}

const list = (told) => h("dl", {}, ...Object.entries(told).map(([name, text]) =>
  h("div", {}, h("dt", { textContent: name }), h("dd", { textContent: text }))));

function frame(ratio, width, ...children) {
  const found = h("div", { className: "frame" }, ...children);
  sized(found, ratio, width);
  return found;
}

function sized(element, ratio, width) {
  element.style.setProperty("--ratio", ratio);
  element.style.setProperty("--most", `${width * LARGEST}px`);
}

function put(kind, wall, about) {
  $("stage").dataset.shows = kind;
  $("wall").replaceChildren(...wall);
  $("about").replaceChildren(...about);
}

// ---- nothing -----------------------------------------------------------------------------------

export function empty(examples, take) {
  put("empty", [h("div", { className: "empty" },
    h("p", { className: "title", textContent: "An empty wall." }),
    h("p", { textContent: "Write what you would like to see, and draw. Or begin with one of these." }),
    h("ul", { role: "list", className: "examples" }, ...examples.map((text) =>
      h("li", {}, h("button", { type: "button", textContent: text, onclick: () => take(text) })))))], []);
}

// ---- on their way ------------------------------------------------------------------------------

// Tiles for pictures to come; returns what is called with what is heard of them.
export function coming(count, ratio, width) {
  const tiles = Array.from({ length: count }, (_, i) => {
    const image = h("img", { alt: `Picture ${i + 1} of ${count}, on its way`, hidden: true });
    const bar = h("span", { className: "hair", "aria-hidden": "true" });
    const text = h("figcaption", { textContent: "Waiting for its turn" });
    const box = h("div", { className: "frame coming" }, image, bar);
    return { image, bar, text, box, tile: tileOf(ratio, width, box, text) };
  });
  put("coming", [sheet(tiles.map((one) => one.tile), ratio)], []);
  return {
    step(index, step, steps, left) {
      tiles[index].bar.style.scale = `${step / steps} 1`;
      tiles[index].text.textContent = `Step ${step} of ${steps}${left < 2 ? "" : `, ${Math.round(left)} s left`}`;
    },
    glance(index, blob, done) {
      const { image, box, text } = tiles[index];
      image.src = addressOf(blob);
      image.hidden = false;
      box.classList.toggle("coming", !done);
      if (done) text.textContent = "Done";
      else image.dataset.glances = Number(image.dataset.glances ?? 0) + 1;
    },
  };
}

function tileOf(ratio, width, ...children) {
  const tile = h("figure", { className: "tile" }, ...children);
  sized(tile, ratio, width);
  return tile;
}

// Tiles in the number of columns in which they are largest.
function sheet(tiles, ratio) {
  const wall = $("wall").getBoundingClientRect();
  const sides = tiles.map((_, i) => {
    const [columns, rows] = [i + 1, Math.ceil(tiles.length / (i + 1))];
    return Math.min(wall.width / columns, (wall.height / rows - 40) * ratio);
  });
  const found = h("div", { className: "sheet" }, ...tiles);
  const columns = sides.indexOf(Math.max(...sides)) + 1;
  found.style.setProperty("--columns", columns);
  found.style.setProperty("--rows", Math.ceil(tiles.length / columns));
  return found;
}

// ---- one ---------------------------------------------------------------------------------------

// does: what its buttons do, by name.
export function one(entry, does) {
  const overlay = h("canvas", { className: "overlay", "aria-hidden": "true", hidden: true });
  const picture = h("img", { src: addressOf(entry.blob), alt: `${entry.settings.prompt}, seed ${entry.seed}` });
  const words = Object.keys(entry.maps ?? {});
  const buttons = words.map((word) => h("button", {
    type: "button", textContent: word, "aria-pressed": "false",
    onclick: async (event) => {
      const on = event.currentTarget.getAttribute("aria-pressed") !== "true";
      for (const button of buttons) button.setAttribute("aria-pressed", "false");
      event.currentTarget.setAttribute("aria-pressed", String(on));
      overlay.hidden = !on;
      if (on) await showMap(overlay, entry.maps[word]);
      overlay.dataset.word = on ? word : "";
    },
  }));
  const { Prompt, ...rest } = facts(entry);
  const tool = (name, text, key) => h("button", { type: "button", onclick: does[key] }, icon(name), text);
  const save = h("a", {
    className: "button", href: addressOf(entry.blob), download: fileName(entry), role: "button",
  }, icon("save"), "Save");
  put("one", [h("figure", { className: "single" }, frame(entry.width / entry.height, entry.width, picture, overlay))], [
    words.length === 0 ? "" : h("div", { className: "words", role: "group", "aria-label": "Attention to words" },
      h("span", { textContent: "Attends to" }), ...buttons),
    h("p", { className: "caption", textContent: Prompt ?? "" }),
    list(rest),
    h("div", { className: "tools", role: "group", "aria-label": "This picture" },
      tool("dials", "Reuse settings", "restore"), tool("picture", "Begin with it", "begin"),
      tool("brush", "Paint a mask", "paint"), save, tool("bin", "Delete", "remove")),
  ].filter(Boolean));
}

export const fileName = (entry) =>
  `${entry.settings.prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 80) || "picture"}-${entry.seed}.png`;

// Dark where the map is, clear where it is bright.
async function showMap(canvas, blob) {
  const map = await createImageBitmap(blob);
  [canvas.width, canvas.height] = [map.width, map.height];
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  pen.drawImage(map, 0, 0);
  const pixels = pen.getImageData(0, 0, map.width, map.height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    const share = pixels.data[i] / 255;
    pixels.data.set([20, 12, 40, Math.round(225 * (1 - share) ** 1.5)], i);
  }
  pen.putImageData(pixels, 0, 0);
  map.close();
}

// ---- several -----------------------------------------------------------------------------------

export function several(entries, open, wiped = false) {
  const told = differences(entries);
  const ratio = Math.exp(entries.reduce((sum, { width, height }) => sum + Math.log(width / height), 0) / entries.length);
  const mode = (text, on, act) => h("button", { type: "button", "aria-pressed": String(on), onclick: act }, text);
  const about = [];
  if (entries.length === 2) {
    about.push(h("div", { className: "pair", role: "group", "aria-label": "How to compare" },
      mode("Side by side", !wiped, () => several(entries, open)), mode("Wipe", wiped, () => several(entries, open, true))));
  }
  if (wiped) {
    about.push(h("div", { className: "both" }, ...told.map((each, i) =>
      h("div", {}, h("h3", { textContent: i ? "Right" : "Left" }), list(each)))));
    put("wipe", [wipe(entries)], about);
    return;
  }
  const tiles = entries.map((entry, i) => tileOf(entry.width / entry.height, entry.width,
    h("div", { className: "frame" },
      h("button", { type: "button", className: "open", "aria-label": `Open: ${nameOf(entry)}`, onclick: () => open(entry) },
        h("img", { src: addressOf(entry.blob), alt: nameOf(entry) }))),
    h("figcaption", {}, list(told[i]))));
  const wall = sheet(tiles, ratio);
  wall.style.setProperty("--below", `${2 + 1.2 * Math.min(4, Object.keys(told[0]).length)}rem`);
  put("several", [wall], about);
}

export const nameOf = (entry) => `${entry.settings.prompt || "without a prompt"}, seed ${entry.seed}`;

function wipe([left, right]) {
  const over = h("img", { src: addressOf(right.blob), alt: `Right: ${nameOf(right)}`, className: "over" });
  const box = frame(left.width / left.height, left.width,
    h("img", { src: addressOf(left.blob), alt: `Left: ${nameOf(left)}` }), over);
  const slide = h("input", {
    type: "range", min: 0, max: 100, step: 1, value: 50, className: "slide", "aria-label": "Wipe between the two pictures",
    oninput: () => box.style.setProperty("--at", `${slide.value}%`),
  });
  box.style.setProperty("--at", "50%");
  box.append(slide, h("span", { className: "divider", "aria-hidden": "true" }));
  return h("figure", { className: "single" }, box);
}

// ---- a mask ------------------------------------------------------------------------------------

export function painting(painter, leave) {
  const { frame: box, tools, ratio } = painter.show(leave);
  sized(box, ratio, painter.width);
  put("painting", [h("figure", { className: "single" }, box)], [
    h("p", { className: "help", textContent: "Paint over what is to be drawn anew." }), tools]);
  painter.canvas.focus({ preventScroll: true });
}
