/** Images that an option takes: chosen, dropped or taken from the gallery. */

import { button, element } from "./dom.js";
import { FieldError } from "./controls.js";
import { imageOf, readFile, TYPES } from "./image-files.js";

/** One image; `extras` are further buttons, called with the slot. */
function imageSlot(id, name, say, extras = []) {
  let value;
  const input = element("input", { id, type: "file", accept: TYPES.join() });
  const thumbnail = element("img", { alt: "", hidden: true });
  const choose = element(
    "label",
    { class: "file-button" },
    input,
    element("span", { class: "button" }, "Choose a file"),
  );
  const remove = button("Remove", () => put(undefined), { class: "quiet", "aria-label": `Remove ${name}` });
  const buttons = element("div", { class: "buttons" }, choose, ...extras, remove);
  const node = element("div", { class: "slot" }, thumbnail, buttons);

  function set(address) {
    value = address || undefined;
    thumbnail.hidden = remove.hidden = !value;
    if (value) thumbnail.src = value;
    else thumbnail.removeAttribute("src");
    thumbnail.alt = value ? name : "";
    input.value = "";
  }
  function put(address) {
    const hadFocus = document.activeElement === remove;
    set(address);
    if (hadFocus) input.focus();
    node.dispatchEvent(new Event("change", { bubbles: true }));
  }
  async function take(file) {
    if (!file) return;
    try {
      put(await readFile(file));
    } catch (error) {
      if (!(error instanceof FieldError)) throw error;
      say(error.message);
    }
  }
  input.addEventListener("change", (event) => {
    event.stopPropagation(); // the slot says when the file has been read
    take(input.files[0]);
  });
  node.addEventListener("dragover", (event) => event.preventDefault());
  node.addEventListener("drop", (event) => {
    const file = imageOf(event.dataTransfer);
    if (file) event.preventDefault();
    take(file);
  });
  set(undefined);
  return { node, input, set, put, get: () => value };
}

export function imageControl(row, { id, say, extras = [] }) {
  const slot = imageSlot(id, row.label, say, extras);
  const write = (value) => slot.set(Array.isArray(value) ? value[0] : value);
  return { nodes: [slot.node], inputs: [slot.input], read: slot.get, write, put: slot.put };
}

/** Several images: as many as `names` has, or for null as many as are chosen. */
export function imagesControl(row, { id, say, names }) {
  const slots = [];
  const node = element("div", { class: "slots" });
  const add = (name) => {
    const slot = imageSlot(slots.length ? `${id}-${slots.length}` : id, name, say);
    slots.push(slot);
    node.append(slot.node);
    return slot;
  };
  const more = () => names === null && slots.every((slot) => slot.get()) && add(`${row.label} ${slots.length + 1}`);
  (names ?? [row.label]).forEach(add);
  node.addEventListener("change", more);
  const read = () => {
    const values = slots.map((slot) => slot.get());
    if (values.every((value) => value === undefined)) return undefined;
    if (names !== null && values.includes(undefined)) throw new FieldError("Choose an image for each, or for none.");
    const chosen = values.filter(Boolean);
    return chosen.length === 1 ? chosen[0] : chosen;
  };
  const write = (value) => {
    const values = value === undefined ? [] : [value].flat();
    if (names === null) while (slots.length < values.length) add(`${row.label} ${slots.length + 1}`);
    slots.forEach((slot, i) => slot.set(values[i]));
    more();
  };
  return { nodes: [node], inputs: [slots[0].input], read, write };
}
