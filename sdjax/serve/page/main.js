/** The page: parts that know nothing of each other, put together. */

import { fetchImage, getModels, getOptions, postJob, readSettings } from "./api.js";
import { byId, element, show } from "./dom.js";
import { takeDrops } from "./drops.js";
import { Form } from "./form.js";
import { Gallery, imagesOf } from "./gallery.js";
import { readFile } from "./image-files.js";
import { isActive, Jobs } from "./jobs.js";
import { announcer, banner, toast } from "./notices.js";
import { Queue } from "./queue.js";
import { valuesOf } from "./records.js";
import { load, loadImages, save, saveImages } from "./state.js";
import { Viewer } from "./viewer.js";
import { percent, state } from "./words.js";

const KEPT = 20; // jobs of which this tab keeps all that it sent, images included
const PATIENCE = 300; // milliseconds before it is said that a model loads
const sent = new Map();
const watched = new Set(); // ids of jobs whose end is of interest here, also where it is no image
let images = [];

const promptOf = (job) => sent.get(job.id)?.prompt ?? job.prompt ?? job.images.find(Boolean)?.settings.prompt ?? null;
const say = announcer(promptOf);

const form = new Form({ onSeed: () => images[0]?.settings.seed });
const jobs = new Jobs({ onChange: render, onFailure: banner });
const queue = new Queue({ promptOf, onCancel: attempt((id) => jobs.cancel(id)), onDismiss: dismiss });
const gallery = new Gallery({ onOpen: (key) => viewer.open(key) });
const viewer = new Viewer({
  images: () => images,
  onUse: attempt(({ settings, job }) =>
    use(settings, `Settings of seed ${settings.seed} are in the form.`, sent.get(job)),
  ),
  onInit: attempt(async (image) => begin(await fetchImage(image.url))),
  onCopy: attempt(copy),
  onClose: (key) => gallery.focus(key),
});

/** A function whose errors are said at the foot of the page. */
function attempt(run) {
  return async (...given) => {
    try {
      return await run(...given);
    } catch (error) {
      toast(error.message);
    }
  };
}

// Jobs

function render(all) {
  const { hiddenBefore = 0 } = load();
  const seen = all.filter((job) => isActive(job) || job.created > hiddenBefore);
  images = imagesOf(seen);
  all.filter(isActive).forEach((job) => watched.add(job.id));
  queue.show(all.filter((job) => job.state !== "done" && watched.has(job.id)));
  gallery.show(images);
  byId("empty").hidden = seen.length > 0;
  byId("hide-all").hidden = !images.length;
  byId("show-all").hidden = seen.length === all.length;
  all.filter((job) => sent.has(job.id)).forEach((job) => say(job, state(job), percent(job)));
  const running = all.find((job) => job.state === "running");
  document.title = running ? `${percent(running)} % · sdjax` : "sdjax";
}

function dismiss(id) {
  watched.delete(id);
  render(jobs.all);
}

function hideBefore(time) {
  save({ hiddenBefore: time });
  render(jobs.all);
}

async function generate() {
  const body = form.body(byId("model").value || null);
  const go = byId("generate");
  if (!body || go.disabled) return;
  go.disabled = true;
  try {
    const job = await postJob(body);
    sent.set(job.id, body);
    if (sent.size > KEPT) sent.delete(sent.keys().next().value);
    jobs.put(job);
    if (matchMedia("(max-width: 820px)").matches) byId("results").scrollIntoView({ behavior: "smooth" });
  } catch (error) {
    form.fail(error);
  }
  go.disabled = false;
}

// Settings

/** Settings of an image into the form, and its model, if the server has it. */
async function use(settings, message, body) {
  const model = byId("model");
  const isOther = settings.model !== model.value && [...model.options].some(({ value }) => value === settings.model);
  if (isOther) await choose(settings.model);
  const { values, missing } = valuesOf(settings, form.imageNames, body?.options);
  const lost = missing.map((name) => form.fields.get(name)?.row.label.toLowerCase() ?? name).join(", ");
  replace(values, lost ? `${message} Choose its ${lost}: no image keeps another.` : message);
  byId("fields").querySelector("textarea, input, select")?.focus();
}

/** Other values into the form, which can be undone. */
function replace(values, message) {
  const before = form.values();
  const put = (those) => {
    form.write(those);
    keep();
  };
  put(values);
  toast(message, Object.keys(before).length ? [["Undo", () => put(before)]] : []);
}

async function begin(file) {
  form.set("init_image", await readFile(file));
  form.fields.get("init_image")?.focus();
}

/** Reads the settings of a file that was dropped, pasted or chosen. */
async function take(file) {
  const init = ["Use as init image", attempt(() => begin(file))];
  try {
    const { settings, warnings } = await readSettings(file);
    await use(settings, ["Settings of the image are in the form.", ...warnings].join(" "));
  } catch (error) {
    toast(error.message, form.fields.has("init_image") ? [init] : []);
  }
}

async function copy(image) {
  if (!navigator.clipboard) throw new Error("Browsers copy for pages of this machine and of https alone.");
  await navigator.clipboard.writeText(image.parameters);
  toast("The settings are copied as A1111 writes them.");
}

/** The form outlives a reload. */
function keep() {
  keepTexts();
  keepImages();
}

function keepTexts() {
  save({ model: byId("model").value, values: entries((name) => !form.isImage(name)) });
}

function keepImages() {
  saveImages(entries((name) => form.isImage(name)));
}

const entries = (isWanted) => Object.fromEntries(Object.entries(form.values()).filter(([name]) => isWanted(name)));

// Start

async function choose(model) {
  const loading = setTimeout(() => show(byId("loading"), `Loading ${model ?? "the model"} …`), PATIENCE);
  byId("generate").disabled = true;
  form.say("");
  try {
    const facts = await getOptions(model);
    form.build(facts);
    byId("model").value = facts.model;
  } catch (error) {
    form.say(error.message);
  }
  clearTimeout(loading);
  show(byId("loading"), "");
  byId("generate").disabled = false;
}

async function start() {
  const kept = load();
  const models = await getModels();
  byId("model").replaceChildren(...models.map(({ id }) => element("option", { value: id }, id)));
  const isKnown = models.some(({ id }) => id === kept.model);
  await choose(isKnown ? kept.model : null);
  form.write({ ...kept.values, ...(await loadImages()) });
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
byId("form").addEventListener("input", keepTexts);
byId("form").addEventListener("change", (event) => (event.target.closest(".kind-image") ? keep : keepTexts)());
byId("reset").addEventListener("click", () => replace({}, "All options are the model’s own."));
byId("model").addEventListener("change", async (event) => {
  await choose(event.target.value);
  keep();
});
byId("hide-all").addEventListener("click", () => hideBefore(Math.max(...jobs.all.map((job) => job.created))));
byId("show-all").addEventListener("click", () => hideBefore(0));
addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !document.querySelector("dialog[open]")) {
    event.preventDefault();
    generate();
  }
});
takeDrops(take);
jobs.refresh();
attempt(start)();
