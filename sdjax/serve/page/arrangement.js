/**
 * Where options stand. What an option is, and whether there is one, the server says; those that are not named here come
 * last, under "More options".
 */

export const PROMPTS = [
  { name: "prompt", kind: "text", rows: 3, help: "" },
  { name: "negative_prompt", kind: "text", rows: 2, help: "" },
];

const SECTIONS = [
  {
    id: "common",
    title: null,
    names: ["sampler", "schedule", "steps", "guidance_scale", "num_images", "width", "height", "seed"],
  },
  { id: "image", title: "Image to image, inpainting", names: ["init_image", "mask", "strength", "feather"] },
  { id: "lora", title: "LoRA", names: ["lora_scale"] },
  { id: "control", title: "ControlNet", prefix: "control_" },
  { id: "more", title: "More options", prefix: "" },
];

// An empty seed is drawn: the table's own choice would make the same image each time.
export const EMPTY = { seed: -1 };
// What an empty field stands for where the table has no default.
export const STANDING = { seed: "random", num_images: "1" };

/** Rows of options by section, each once, in the sections' order. */
export function arranged(rows) {
  const left = new Map(rows.map((row) => [row.name, row]));
  for (const { name } of PROMPTS) left.delete(name);
  return SECTIONS.map((section) => {
    const names = section.names ?? [...left.keys()].filter((name) => name.startsWith(section.prefix));
    const own = names.map((name) => left.get(name)).filter(Boolean);
    own.forEach((row) => left.delete(row.name));
    return { ...section, rows: own };
  }).filter((section) => section.rows.length);
}

/** Names of what an option has an entry for each of; null for one value. */
export function namesOf(row, facts) {
  if (row.name === "lora_scale") return facts.loras;
  if (!row.name.startsWith("control_") || !(row.many || row.kind === "scales")) return null;
  return Array.from({ length: facts.controlnets }, (_, i) => `ControlNet ${i + 1}`);
}

/** A row for one ControlNet has one number, not a list. */
export function singled(row, facts) {
  const isOne = row.kind === "scales" && row.name.startsWith("control_") && facts.controlnets === 1;
  return isOne ? { ...row, kind: "float" } : row;
}
