// Small tools that all modules use.

export const $ = (id) => document.getElementById(id);

// An element: properties by their names, `data-...`, `aria-...` and `role` as attributes, `on...` as listeners.
export function h(tag, given = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (value === null || value === undefined) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (/^(data|aria)-|^(role|for)$/.test(name)) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

export function icon(name) {
  const of = "http://www.w3.org/2000/svg";
  const [svg, use] = [document.createElementNS(of, "svg"), document.createElementNS(of, "use")];
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

// An address of a blob for as long as its element is in the page, or `forget` is called.
const addresses = new WeakMap();

export function addressOf(blob) {
  if (!addresses.has(blob)) addresses.set(blob, URL.createObjectURL(blob));
  return addresses.get(blob);
}

export function forget(blob) {
  if (blob && addresses.has(blob)) URL.revokeObjectURL(addresses.get(blob));
  if (blob) addresses.delete(blob);
}

export function toBlob(canvas, type = "image/png", quality = undefined) {
  return new Promise((done, fail) =>
    canvas.toBlob((blob) => (blob ? done(blob) : fail(new Error("the picture cannot be made"))), type, quality));
}

// Whether the user says yes.
export function sure(text, yes = "Delete") {
  $("sure-text").textContent = text;
  $("sure-yes").textContent = yes;
  $("sure").returnValue = "";
  $("sure").showModal();
  return new Promise((done) =>
    $("sure").addEventListener("close", () => done($("sure").returnValue === "yes"), { once: true }));
}
