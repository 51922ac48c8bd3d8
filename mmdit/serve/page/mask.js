// Painting a mask over a picture: by mouse, pen, finger or keys.

import { $, addressOf, h, icon, toBlob } from "./dom.js";

const MOST = 2048; // pixels of a side that is painted on
const STEP = 12; // pixels on the screen that an arrow key moves the brush

export class Painter {
  constructor(blob, width, height) {
    this.scale = Math.min(1, MOST / Math.max(width, height));
    [this.blob, this.width, this.height] = [blob, width, height];
    this.canvas = h("canvas", {
      width: Math.round(width * this.scale), height: Math.round(height * this.scale), tabIndex: 0, role: "application",
      "aria-label": "Mask. Arrow keys move the brush, Space paints, Ctrl+Z takes back.",
    });
    this.pen = this.canvas.getContext("2d", { willReadFrequently: true });
    this.done = []; // what was painted: strokes, "invert", "clear"
    this.undone = this.done.length;
    this.erasing = false;
    this.at = null; // where the keys' brush is, in pixels of the canvas
    this.#listen();
  }

  get empty() {
    const { data } = this.pen.getImageData(0, 0, this.canvas.width, this.canvas.height);
    for (let i = 3; i < data.length; i += 4) if (data[i]) return false;
    return true;
  }

  // A PNG as large as the picture, transparent where it is painted anew.
  async mask() {
    const whole = h("canvas", { width: this.width, height: this.height });
    const pen = whole.getContext("2d");
    pen.fillRect(0, 0, this.width, this.height);
    pen.globalCompositeOperation = "destination-out";
    pen.drawImage(this.canvas, 0, 0, this.width, this.height);
    return toBlob(whole);
  }

  undo() {
    this.done.pop();
    this.pen.clearRect(0, 0, this.canvas.width, this.canvas.height);
    for (const action of this.done) this.#show(action);
  }

  act(action) {
    this.done.push(action);
    this.#show(action);
  }

  #show(action) {
    const { pen, canvas } = this;
    if (action === "clear") pen.clearRect(0, 0, canvas.width, canvas.height);
    else if (action === "invert") {
      pen.globalCompositeOperation = "source-out";
      pen.fillStyle = this.colour;
      pen.fillRect(0, 0, canvas.width, canvas.height);
    } else action.points.forEach((_, i) => this.#line(action, i));
  }

  // The part of a stroke that ends at its point i.
  #line({ points, erase }, i) {
    const { pen } = this;
    const [from, to] = [points[Math.max(0, i - 1)], points[i]];
    pen.globalCompositeOperation = erase ? "destination-out" : "source-over";
    pen.strokeStyle = this.colour;
    pen.lineWidth = to.width;
    pen.lineCap = "round";
    pen.beginPath();
    pen.moveTo(from.x, from.y);
    pen.lineTo(to.x + 0.01, to.y); // a line of no length would not be there
    pen.stroke();
  }

  get colour() {
    return getComputedStyle(this.canvas).getPropertyValue("--accent").trim() || "#b4431f";
  }

  // Pixels of the canvas for one on the screen.
  get ratio() {
    return this.canvas.width / this.canvas.getBoundingClientRect().width;
  }

  get brush() {
    return Number($("brush")?.value ?? 40);
  }

  #point(event) {
    const box = this.canvas.getBoundingClientRect();
    const width = this.brush * this.ratio * (event.pointerType === "pen" ? 0.3 + 0.9 * event.pressure : 1);
    return { x: (event.clientX - box.left) * this.ratio, y: (event.clientY - box.top) * this.ratio, width };
  }

  #listen() {
    const { canvas } = this;
    let stroke = null;
    const extend = (event) => {
      for (const each of event.getCoalescedEvents?.() ?? [event]) {
        stroke.points.push(this.#point(each));
        this.#line(stroke, stroke.points.length - 1);
      }
    };
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 && event.button !== 5) return;
      canvas.setPointerCapture(event.pointerId);
      stroke = { erase: this.erasing || event.button === 5, points: [] }; // 5: the pen's other end
      this.done.push(stroke);
      stroke.points.push(this.#point(event));
      this.#line(stroke, 0);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (stroke) extend(event);
      const box = canvas.getBoundingClientRect();
      this.#ring(event.clientX - box.left, event.clientY - box.top, event.pointerType !== "touch");
    });
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => { stroke = null; });
    canvas.addEventListener("pointerleave", () => this.#ring(0, 0, false));
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("blur", () => this.#ring(0, 0, false));
  }

  #key(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    this.at ??= { x: this.canvas.width / 2, y: this.canvas.height / 2 };
    const point = () => ({ ...this.at, width: this.brush * this.ratio });
    if (event.key in moves) {
      const [across, down] = moves[event.key].map((each) => each * STEP * this.ratio * (event.shiftKey ? 4 : 1));
      this.at.x = Math.min(this.canvas.width, Math.max(0, this.at.x + across));
      this.at.y = Math.min(this.canvas.height, Math.max(0, this.at.y + down));
    } else if (event.key === " ") {
      this.act({ erase: this.erasing, points: [point()] });
    } else return;
    event.preventDefault();
    this.#ring(this.at.x / this.ratio, this.at.y / this.ratio, true);
  }

  #ring(x, y, seen) {
    const ring = this.canvas.parentElement?.querySelector(".ring");
    if (!ring) return;
    ring.hidden = !seen;
    ring.style.width = ring.style.height = `${this.brush}px`;
    ring.style.translate = `${x - this.brush / 2}px ${y - this.brush / 2}px`;
  }

  // The picture under the mask, and the tools. leave: called at the end, with whether the mask is to be used.
  show(leave) {
    const before = [...this.done];
    const press = (button, on) => button.setAttribute("aria-pressed", String(on));
    const tool = (name, text, act) => h("button", { type: "button", onclick: act }, icon(name), text);
    const paint = h("button", { type: "button", "aria-pressed": "true", onclick: () => erase(false) }, "Paint");
    const rub = h("button", { type: "button", "aria-pressed": "false", onclick: () => erase(true) }, "Erase");
    const erase = (on) => {
      this.erasing = on;
      press(paint, !on);
      press(rub, on);
    };
    erase(false);
    const brush = h("input", { id: "brush", type: "range", min: 4, max: 160, value: this.brush });
    const frame = h("div", { className: "frame painting" },
      h("img", { src: addressOf(this.blob), alt: "The picture under the mask" }), this.canvas,
      h("div", { className: "ring", hidden: true }));
    const discard = () => {
      this.done = before;
      this.act("clear");
      this.undo();
      leave(false);
    };
    const tools = h("div", { className: "tools", role: "group", "aria-label": "Painting a mask" },
      h("div", { className: "pair", role: "group", "aria-label": "Brush" }, paint, rub),
      h("label", { className: "inline" }, "Brush size", brush),
      h("button", { type: "button", onclick: () => this.undo() }, "Undo"),
      h("button", { type: "button", onclick: () => this.act("invert") }, "Invert"),
      h("button", { type: "button", onclick: () => this.act("clear") }, "Clear"),
      h("button", { type: "button", className: "quiet", onclick: discard }, "Discard"),
      tool("brush", "Use the mask", () => leave(true)));
    tools.lastChild.className = "primary";
    frame.addEventListener("keydown", (event) => {
      if ((event.ctrlKey || event.metaKey) && event.key === "z") {
        event.preventDefault();
        this.undo();
      }
    });
    return { frame, tools, ratio: this.width / this.height };
  }
}
