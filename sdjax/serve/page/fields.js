/** Fields: a label, a control, help and an error, made from a row of the server's table of options. */

import {
  boolControl,
  choiceControl,
  eachControl,
  FieldError,
  jsonControl,
  longTextControl,
  numberControl,
  pairControl,
  scalesControl,
  textControl,
} from "./controls.js";
import { imageControl, imagesControl } from "./image-control.js";
import { element, show } from "./dom.js";
import { label, range } from "./words.js";

const KINDS = {
  int: numberControl,
  float: numberControl,
  bool: boolControl,
  pair: pairControl,
  scales: scalesControl,
  json: jsonControl,
  text: longTextControl,
};

function controlOf(row, how) {
  if (row.kind === "image")
    return row.many && how.names?.length !== 1 ? imagesControl(row, how) : imageControl(row, how);
  if (row.kind === "scales" && how.names?.length) return eachControl(row, how);
  if (row.kind === "str") return row.choices.length ? choiceControl(row, how) : textControl(row, how);
  return (KINDS[row.kind] ?? textControl)(row, how);
}

/**
 * A field of an option.
 *
 * `how` may have `names`, of the things that a list has an entry for; `step` of its number; `extras`, buttons of an
 * image; `after`, nodes beside the control.
 */
export function makeField(row, how = {}) {
  const id = `option-${row.name}`;
  const named = { label: label(row.name), ...row };
  const error = element("p", { id: `${id}-error`, class: "error", hidden: true });
  const say = (text) => {
    show(error, text);
    for (const input of control.inputs) input.setAttribute("aria-invalid", Boolean(text));
  };
  const control = controlOf(named, { names: null, ...how, id, say });
  const help = element("p", { id: `${id}-help`, class: "help" }, helpOf(named));
  for (const input of control.inputs) input.setAttribute("aria-describedby", `${help.id} ${error.id}`);
  const isGroup = control.inputs[0].id !== id;
  const title = isGroup
    ? element("span", { class: "label", id: `${id}-label`, title: help.textContent }, named.label)
    : element("label", { class: "label", for: id, title: help.textContent }, named.label);
  const body = element("div", { class: "control" }, ...control.nodes, ...(how.after ?? []));
  const group = isGroup ? { role: "group", "aria-labelledby": `${id}-label` } : {};
  const node = element(
    "div",
    { class: `field kind-${row.kind}`, "data-option": row.name, ...group },
    title,
    body,
    help,
    error,
  );
  for (const event of ["input", "change"]) node.addEventListener(event, () => say(""));
  return { row: named, node, say, ...control, focus: () => reveal(control.inputs[0]) };
}

function helpOf(row) {
  const limits = row.choices?.length ? "" : range(row);
  return [row.help, limits && `(${limits})`].filter(Boolean).join(" ");
}

/** Focus an input, opening what it is folded into. */
function reveal(input) {
  for (let fold = input.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
  input.focus();
}

/** The value of a field; undefined for the model's choice or where it is wrong, which is then said beside it. */
export function valueOf(field, wrong = []) {
  try {
    return field.read() ?? undefined;
  } catch (error) {
    if (!(error instanceof FieldError)) throw error;
    field.say(error.message);
    wrong.push(field);
    return undefined;
  }
}
