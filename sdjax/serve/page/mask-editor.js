/** The dialog in which a mask is drawn on an image, by mouse, pen, finger or keyboard. */

import { button, byId, element } from "./dom.js";
import { decode } from "./image-files.js";
import { baseOf, drawMask, drawStroke, maskUrl } from "./mask.js";

const HELP =
  "Mark what is made anew. By keyboard: arrows move the brush (with Shift by a pixel), " +
  "Space sets it down and lifts it, [ and ] change its size, E erases, Ctrl+Z undoes.";
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/**
 * Shows an image and its mask, both data URLs; gives the mask as it was left, undefined for none, null where nothing is
 * to change.
 */
export async function editMask(imageUrl, maskAddress) {
  const image = await decode(imageUrl);
  const base = maskAddress ? baseOf(await decode(maskAddress), image.naturalWidth, image.naturalHeight) : null;
  const dialog = byId("mask-editor");
  return new Promise((resolve) => new Editor(dialog, image, base, resolve));
}

class Editor {
  constructor(dialog, image, base, resolve) {
    Object.assign(this, { dialog, image, base, strokes: [], current: null, isDown: false });
    this.size = [image.naturalWidth, image.naturalHeight];
    this.cursor = this.size.map((side) => side / 2);
    this.build();
    dialog.returnValue = "";
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "done" ? maskUrl(this.canvas) : null), {
      once: true,
    });
    dialog.showModal();
    this.redraw();
    this.canvas.focus();
  }

  build() {
    const [width, height] = this.size;
    const label = "Mask. Arrow keys move the brush, Space sets it down and lifts it.";
    this.canvas = element("canvas", { width, height, tabindex: 0, role: "application", "aria-label": label });
    this.ring = element("div", { class: "brush", "aria-hidden": true });
    this.image.alt = "The image that the mask is of";
    const stage = element("div", { class: "stage" }, this.image, this.canvas, this.ring);
    this.stage = stage;
    const longest = Math.max(width, height);
    this.brush = element("input", {
      id: "brush-size",
      type: "range",
      min: 1,
      max: Math.ceil(longest / 2),
      value: Math.ceil(longest / 8),
    });
    this.eraser = button("Eraser", () => this.toggleEraser(), { "aria-pressed": "false" });
    this.undoButton = button("Undo", () => this.undo(), {});
    const done = button("Done", () => this.dialog.close("done"), { class: "primary" });
    const cancel = button("Cancel", () => this.dialog.close(), { class: "quiet" });
    const size = element("label", { class: "brush-size", for: "brush-size" }, "Brush", this.brush);
    const clear = button("Clear", () => this.add({ kind: "clear" }));
    const invert = button("Invert", () => this.add({ kind: "invert" }));
    this.dialog.replaceChildren(
      element("h2", { id: "mask-title" }, "Mask"),
      stage,
      element("div", { class: "tools" }, size, this.eraser, this.undoButton, clear, invert),
      element("p", { class: "help" }, HELP),
      element("div", { class: "tools end" }, cancel, done),
    );
    this.listen();
  }

  listen() {
    const { canvas } = this;
    canvas.addEventListener("pointerdown", (event) => this.begin(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => this.end());
    canvas.addEventListener("pointerleave", () => (this.ring.hidden = true));
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    canvas.addEventListener("focus", () => this.showRing());
    this.brush.addEventListener("input", () => this.showRing());
    this.stage.parentElement.onkeydown = (event) => this.key(event);
  }

  get width() {
    return Number(this.brush.value);
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    return [
      ((event.clientX - box.left) * this.size[0]) / box.width,
      ((event.clientY - box.top) * this.size[1]) / box.height,
    ];
  }

  begin(event) {
    event.preventDefault();
    this.canvas.focus();
    this.canvas.setPointerCapture(event.pointerId);
    this.cursor = this.point(event);
    // The secondary button, and the other end of a pen.
    this.start(event.buttons === 2 || event.buttons === 32);
  }

  start(erase = false) {
    this.current = { kind: "line", erase: erase || this.isErasing, width: this.width, points: [this.cursor] };
    this.strokes.push(this.current);
    this.redraw();
  }

  move(event) {
    const events = event.getCoalescedEvents?.() ?? [];
    const points = (events.length ? events : [event]).map((one) => this.point(one));
    this.cursor = points.at(-1);
    this.showRing();
    if (this.current && !this.isDown) this.extend(points);
  }

  extend(points) {
    const last = this.current.points.at(-1);
    this.current.points.push(...points);
    drawStroke(this.canvas, { ...this.current, points: [last, ...points] });
  }

  end() {
    this.current = null;
    this.isDown = false;
    this.redraw();
  }

  key(event) {
    if (event.key.toLowerCase() === "z" && (event.ctrlKey || event.metaKey))
      return this.handled(event, () => this.undo());
    if (event.target !== this.canvas) return;
    if (event.key === " ") this.handled(event, () => this.press());
    else if (event.key === "[" || event.key === "]")
      this.handled(event, () => this.resize(event.key === "]" ? 1.25 : 0.8));
    else if (event.key.toLowerCase() === "e") this.handled(event, () => this.toggleEraser());
    else if (event.key in ARROWS) this.handled(event, () => this.step(ARROWS[event.key], event.shiftKey));
  }

  handled(event, act) {
    event.preventDefault();
    act();
  }

  press() {
    if (this.isDown) return this.end();
    this.start();
    this.isDown = true;
    this.showRing();
  }

  step(direction, isSmall) {
    const far = isSmall ? 1 : Math.max(1, this.width / 4);
    this.cursor = this.cursor.map((at, i) => Math.min(Math.max(at + direction[i] * far, 0), this.size[i]));
    if (this.isDown) this.extend([this.cursor]);
    this.showRing();
  }

  resize(factor) {
    const wanted = this.width * factor;
    this.brush.value = factor > 1 ? Math.ceil(wanted) : Math.floor(wanted);
    this.showRing();
  }

  toggleEraser() {
    this.isErasing = !this.isErasing;
    this.eraser.setAttribute("aria-pressed", this.isErasing);
  }

  add(stroke) {
    this.end();
    this.strokes.push(stroke);
    this.redraw();
  }

  undo() {
    this.strokes.pop();
    this.end();
  }

  redraw() {
    drawMask(this.canvas, this.base, this.strokes);
    this.undoButton.disabled = !this.strokes.length;
    this.showRing();
  }

  showRing() {
    const scale = this.canvas.clientWidth / this.size[0];
    const across = this.width * scale;
    this.ring.hidden = false;
    this.ring.classList.toggle("down", this.isDown);
    Object.assign(this.ring.style, { width: `${across}px`, height: `${across}px` });
    const [left, top] = this.cursor.map((at) => at * scale - across / 2);
    this.ring.style.transform = `translate(${left}px, ${top}px)`;
  }
}
