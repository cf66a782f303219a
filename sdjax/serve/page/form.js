/** The form: fields of the model's options, what they say, and what the server says of them. */

import { arranged, EMPTY, namesOf, PROMPTS, singled, STANDING } from "./arrangement.js";
import { standing } from "./controls.js";
import { button, byId, element, show } from "./dom.js";
import { makeField, valueOf } from "./fields.js";
import { editMask } from "./mask-editor.js";
import { count } from "./words.js";

export class Form {
  /** `onSeed` gives the seed to reuse. */
  constructor({ onSeed }) {
    this.fields = new Map();
    this.folds = new Map();
    this.onSeed = onSeed;
    this.node = byId("form");
    this.node.addEventListener("input", () => this.count());
    this.node.addEventListener("change", (event) => this.changed(event));
  }

  /** Fields of a model, which keep what those of the same names said. */
  build(facts) {
    const kept = this.fields.size ? this.values() : {};
    const opened = new Set([...this.folds].filter(([, { fold }]) => fold.open).map(([id]) => id));
    this.fields.clear();
    this.folds.clear();
    this.facts = facts;
    const takesPrompt = facts.inputs.includes("prompt");
    const prompts = takesPrompt ? PROMPTS.map((row) => this.add(row)) : [];
    const sections = arranged(facts.options).map((section) => this.section(section));
    byId("fields").replaceChildren(...prompts, ...sections);
    for (const id of opened) if (this.folds.has(id)) this.folds.get(id).fold.open = true;
    this.write(kept);
  }

  add(row, how) {
    const field = makeField({ ...row, standing: STANDING[row.name] }, how);
    this.fields.set(row.name, field);
    return field.node;
  }

  section({ id, title, rows }) {
    const nodes = rows.map((row) => this.add(singled(row, this.facts), this.how(row)));
    if (title === null) return element("div", { class: "grid common" }, ...nodes);
    const badge = element("span", { class: "badge" });
    const fold = element(
      "details",
      { id: `section-${id}` },
      element("summary", {}, title, badge),
      element("div", { class: "grid" }, ...nodes),
    );
    this.folds.set(id, { fold, badge, rows });
    return fold;
  }

  /** How a field is made beyond what its row says. */
  how(row) {
    const [height, width] = this.facts.default_size;
    const side = { width, height }[row.name];
    if (side) {
      row.default ??= side;
      const swap = button("⇄", () => this.swap(), {
        class: "quiet icon",
        "aria-label": "Swap width and height",
        title: "Swap",
      });
      return { step: this.facts.multiple, after: row.name === "height" ? [swap] : [] };
    }
    if (row.name === "seed") return { after: this.seedButtons() };
    if (row.name === "mask") return { extras: [button("Draw", () => this.draw(), { id: "draw-mask" })] };
    return { names: namesOf(row, this.facts), suggestions: row.name === "class_label" ? this.facts.classes : [] };
  }

  seedButtons() {
    const reuse = () => this.set("seed", this.onSeed());
    return [
      button("Random", () => this.set("seed", undefined), { class: "quiet" }),
      button("Reuse", reuse, { class: "quiet", title: "The seed of the newest image" }),
    ];
  }

  swap() {
    const [width, height] = ["width", "height"].map((name) => valueOf(this.fields.get(name)));
    this.set("width", height);
    this.set("height", width);
  }

  async draw() {
    const image = this.value("init_image");
    const field = this.fields.get("mask");
    if (!image) return field.say("Choose an init image first; the mask is drawn on it.");
    const mask = await editMask(image, this.value("mask"));
    if (mask !== null) field.put(mask);
    byId("draw-mask").focus();
  }

  changed(event) {
    // A mask is of one image.
    if (event.target.closest("[data-option]")?.dataset.option === "init_image")
      this.fields.get("mask")?.write(undefined);
    this.count();
  }

  /** Sizes that are left out are those of the image to begin from. */
  showSizes() {
    for (const name of ["width", "height"]) {
      const field = this.fields.get(name);
      if (field) field.inputs[0].placeholder = this.value("init_image") ? "as the image" : standing(field.row);
    }
  }

  /** How many options are set within each fold, so that none acts unseen. */
  count() {
    for (const { badge, rows } of this.folds.values()) {
      const set = rows.filter((row) => this.value(row.name) !== undefined).length;
      badge.textContent = set ? `${count(set, "option")} set` : "";
    }
    this.showSizes();
  }

  value(name) {
    try {
      return this.fields.get(name)?.read();
    } catch {
      return undefined;
    }
  }

  set(name, value) {
    const field = this.fields.get(name);
    if (!field) return false;
    field.write(value);
    field.say("");
    field.node.dispatchEvent(new Event("change", { bubbles: true }));
    return true;
  }

  /** All values by name, prompts included. */
  values() {
    const read = [...this.fields.keys()].map((name) => [name, this.value(name)]);
    return Object.fromEntries(read.filter(([, value]) => value !== undefined));
  }

  /** Values by name; a field that has none is left to the model. Gives the names that no field has. */
  write(values) {
    for (const [name, field] of this.fields) {
      field.write(values[name] ?? undefined);
      field.say("");
    }
    this.say("");
    this.count();
    return Object.keys(values).filter((name) => !this.fields.has(name));
  }

  get imageNames() {
    return [...this.fields.keys()].filter((name) => this.isImage(name));
  }

  isImage(name) {
    return this.fields.get(name)?.row.kind === "image";
  }

  /** What POST /v1/jobs takes; null where a field is wrong, which has the focus then. */
  body(model) {
    this.clearErrors();
    const wrong = [];
    const values = {};
    for (const [name, field] of this.fields) {
      const value = valueOf(field, wrong) ?? EMPTY[name];
      if (value !== undefined) values[name] = value;
    }
    if (wrong.length) return wrong[0].focus() ?? null;
    const { prompt, negative_prompt, ...options } = values;
    const takesPrompt = this.fields.has("prompt");
    return { model, prompt: takesPrompt ? (prompt ?? "") : null, negative_prompt: negative_prompt ?? null, options };
  }

  clearErrors() {
    for (const field of this.fields.values()) field.say("");
    this.say("");
  }

  /** An error beside the field that it concerns, else above the button. */
  fail(error) {
    const field = this.fields.get(error.option);
    if (!field) return this.say(error.message);
    field.say(error.message);
    field.focus();
  }

  say(text) {
    show(byId("form-message"), text);
  }
}
