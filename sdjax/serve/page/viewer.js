/** An image with its settings, and what can be done with it. */

import { local } from "./api.js";
import { button, byId, element } from "./dom.js";
import { label } from "./words.js";

const HIDDEN = new Set(["prompt", "negative_prompt", "dtype", "checkpoint"]);

export class Viewer {
  constructor({ images, onUse, onInit, onClose, onCopy }) {
    Object.assign(this, { images, onUse, onInit, onCopy });
    this.dialog = byId("viewer");
    this.dialog.addEventListener("close", () => onClose(this.key));
    this.dialog.addEventListener("keydown", (event) => this.turn({ ArrowLeft: -1, ArrowRight: 1 }[event.key]));
    this.dialog.addEventListener("click", (event) => event.target === this.dialog && this.dialog.close());
  }

  open(key) {
    this.show(key);
    this.dialog.showModal();
  }

  get place() {
    return this.images().findIndex((image) => image.key === this.key);
  }

  turn(by) {
    const next = by && this.images()[this.place + by];
    if (next) this.show(next.key);
  }

  show(key) {
    const image = this.images().find((one) => one.key === key);
    if (!image) return;
    this.key = key;
    const { settings } = image;
    const focused = this.dialog.contains(document.activeElement) ? document.activeElement.dataset.act : null;
    const prompt = settings.prompt || "Without a prompt";
    this.dialog.replaceChildren(
      element(
        "figure",
        {},
        element("img", { src: local(image.url), alt: prompt, width: settings.width, height: settings.height }),
      ),
      element(
        "div",
        { class: "facts" },
        element("h2", { id: "viewer-title" }, prompt),
        this.negative(settings),
        table(settings),
        this.actions(image),
      ),
    );
    if (focused) this.dialog.querySelector(`[data-act="${focused}"]`)?.focus();
  }

  negative({ negative_prompt: text }) {
    return text ? element("p", { class: "negative" }, "Not: ", text) : null;
  }

  actions(image) {
    const act = (name, text, run, attributes = {}) => button(text, run, { "data-act": name, ...attributes });
    const closing = (run) => () => {
      this.dialog.close();
      run(image);
    };
    const name = `${image.settings.model ?? "image"}-${image.settings.seed}-${image.number}.png`;
    const download = element(
      "a",
      { class: "button", href: local(image.url), download: name, "data-act": "download" },
      "Download",
    );
    const [place, last] = [this.place, this.images().length - 1];
    return element(
      "div",
      { class: "actions" },
      act("use", "Use these settings", closing(this.onUse), { class: "primary" }),
      act("init", "Use as init image", closing(this.onInit)),
      download,
      act("copy", "Copy settings", () => this.onCopy(image)),
      act("newer", "←", () => this.turn(-1), { class: "quiet", "aria-label": "Newer image", disabled: place <= 0 }),
      act("older", "→", () => this.turn(1), { class: "quiet", "aria-label": "Older image", disabled: place >= last }),
      act("close", "Close", () => this.dialog.close(), { class: "quiet" }),
    );
  }
}

function table(settings) {
  const rows = Object.entries(settings).filter(
    ([name, value]) => !HIDDEN.has(name) && value !== null && value !== undefined,
  );
  return element(
    "dl",
    {},
    ...rows.map(([name, value]) => element("div", {}, element("dt", {}, label(name)), element("dd", {}, text(value)))),
  );
}

const text = (value) => (typeof value === "object" ? JSON.stringify(value) : String(value));
