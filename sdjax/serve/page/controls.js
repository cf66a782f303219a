/**
 * Inputs by the kind of an option. A control is {nodes, inputs, read, write}: `read` gives undefined where the choice
 * is left to the model and throws a FieldError where the text is none; `write(undefined)` empties it.
 */

import { element } from "./dom.js";
import { range } from "./words.js";

export class FieldError extends Error {}

const written = (value) => (value === null || value === undefined ? "" : String(value));

/** What an empty input stands for. */
export const standing = (row) => written(row.default) || row.standing || "auto";

export function numberControl(row, { id, step } = {}) {
  const isUnit = row.kind !== "int" && row.least === 0 && row.most === 1;
  const input = element("input", {
    id,
    type: "number",
    inputmode: row.kind === "int" && (row.least ?? -1) >= 0 ? "numeric" : "decimal",
    min: row.least,
    max: row.most,
    step: step ?? (row.kind === "int" ? 1 : isUnit ? 0.05 : 0.5),
    placeholder: standing(row),
  });
  input.addEventListener("keydown", (event) => beginAtDefault(event, input, row));
  const read = () => number(input, row);
  const write = (value) => (input.value = written(value));
  return isUnit ? withSlider(row, input, read, write) : { nodes: [input], inputs: [input], read, write };
}

/** The arrows of an empty input step from what it stands for. */
function beginAtDefault(event, input, row) {
  const isArrow = event.key === "ArrowUp" || event.key === "ArrowDown";
  if (isArrow && input.value === "" && typeof row.default === "number") input.value = row.default;
}

function number(input, row) {
  if (input.validity.badInput)
    throw new FieldError(`Enter ${row.kind === "int" ? "an integer" : "a number"}, ${range(row) || "of any size"}.`);
  if (input.value === "") return undefined;
  const value = Number(input.value);
  if (row.kind === "int" && Math.abs(value) > Number.MAX_SAFE_INTEGER) {
    throw new FieldError(`${input.value} has more digits than this page keeps; use the API for it.`);
  }
  return value;
}

function withSlider(row, input, read, write) {
  const slider = element("input", { type: "range", min: 0, max: 1, step: 0.05, tabindex: -1, "aria-hidden": true });
  const follow = () => {
    slider.value = input.value === "" ? (row.default ?? 0.5) : input.value;
    slider.classList.toggle("unset", input.value === "");
  };
  input.addEventListener("input", follow);
  slider.addEventListener("input", () => {
    input.value = slider.value;
    follow();
  });
  follow();
  const both = (value) => {
    write(value);
    follow();
  };
  return { nodes: [slider, input], inputs: [input], read, write: both };
}

export function choiceControl(row, { id }) {
  const empty = element("option", { value: "" }, row.default ? `auto (${row.default})` : "auto");
  const input = element("select", { id }, empty, ...row.choices.map((one) => element("option", { value: one }, one)));
  const read = () => input.value || undefined;
  const write = (value) => (input.value = row.choices.includes(value) ? value : "");
  return { nodes: [input], inputs: [input], read, write };
}

export function boolControl(row, { id }) {
  const control = choiceControl({ ...row, default: null, choices: ["yes", "no"] }, { id });
  const read = () => ({ yes: true, no: false })[control.read()];
  return { ...control, read, write: (value) => control.write({ true: "yes", false: "no" }[value]) };
}

export function longTextControl(row, { id }) {
  const input = element("textarea", { id, rows: row.rows ?? 2, spellcheck: "false", autocapitalize: "off" });
  const read = () => input.value.trim() || undefined;
  return { nodes: [input], inputs: [input], read, write: (value) => (input.value = written(value)) };
}

/** A line of text that `parse` turns into a value and `format` back. */
function lineControl(row, { id }, parse, format, placeholder) {
  const input = element("input", { id, type: "text", placeholder, spellcheck: "false", autocapitalize: "off" });
  const read = () => (input.value.trim() === "" ? undefined : parse(input.value.trim()));
  return {
    nodes: [input],
    inputs: [input],
    read,
    write: (value) => (input.value = value === undefined || value === null ? "" : format(value)),
  };
}

/** Text of any kind; `suggestions` are shown while it is written. */
export function textControl(row, how) {
  const control = lineControl(row, how, (text) => text, listed, standing(row));
  if (!how.suggestions?.length) return control;
  const list = element(
    "datalist",
    { id: `${how.id}-list` },
    ...how.suggestions.map((value) => element("option", { value })),
  );
  control.inputs[0].setAttribute("list", list.id);
  return { ...control, nodes: [...control.nodes, list] };
}

const listed = (value) =>
  Array.isArray(value) ? value.map((one) => (Array.isArray(one) ? one.join(":") : one)).join(", ") : String(value);

function parts(text, separator, wanted) {
  const numbers = text.split(separator).map((part) => (part.trim() === "" ? NaN : Number(part)));
  if (numbers.some(Number.isNaN)) throw new FieldError(`“${text}” is not ${wanted}.`);
  return numbers;
}

export function pairControl(row, how) {
  const wanted = "two integers, vertical first, as 1024, 768";
  const parse = (text) => {
    const numbers = parts(text, ",", wanted);
    if (numbers.length !== 2) throw new FieldError(`“${text}” is not ${wanted}.`);
    return numbers;
  };
  return lineControl(row, how, parse, listed, standing(row));
}

/** Numbers, or pairs of them, as the command line has them: 0.8, 0.5:0.3. */
export function scalesControl(row, how) {
  const parse = (text) => {
    const values = text.split(",").map((one) => parts(one, ":", "a number, or numbers as 0.8, 0.5:0.3"));
    const scales = values.map((one) => (one.length === 1 ? one[0] : one));
    return scales.length === 1 && typeof scales[0] === "number" ? scales[0] : scales;
  };
  return lineControl(row, how, parse, listed, standing(row));
}

export function jsonControl(row, { id }) {
  const control = longTextControl(row, { id });
  const read = () => {
    const text = control.read();
    if (text === undefined) return undefined;
    try {
      return JSON.parse(text);
    } catch (error) {
      throw new FieldError(`This is no JSON: ${error.message}.`);
    }
  };
  return { ...control, read, write: (value) => control.write(value === undefined ? "" : JSON.stringify(value)) };
}

/** A number for each of several named things, which the server takes as a list. */
export function eachControl(row, { id, names }) {
  const controls = names.map((name, i) => numberControl({ ...row, kind: "float" }, { id: `${id}-${i}` }));
  const nodes = controls.map((control, i) =>
    element("div", { class: "each" }, element("label", { for: `${id}-${i}` }, names[i]), ...control.nodes),
  );
  const read = () => {
    const values = controls.map(
      (control, i) => control.read() ?? (Array.isArray(row.default) ? row.default[i] : row.default) ?? undefined,
    );
    if (controls.every((control) => control.read() === undefined)) return undefined;
    if (values.includes(undefined)) throw new FieldError("Enter a number for each, or for none.");
    return values.length === 1 ? values[0] : values;
  };
  const write = (value) => controls.forEach((control, i) => control.write(Array.isArray(value) ? value[i] : value));
  return { nodes, inputs: controls.flatMap((control) => control.inputs), read, write };
}
