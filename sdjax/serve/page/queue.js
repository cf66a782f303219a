/** Cards of jobs that wait, run, or came to nothing. */

import { local } from "./api.js";
import { arrange, button, byId, element } from "./dom.js";
import { isActive } from "./jobs.js";
import { count, joined, percent, state } from "./words.js";

export class Queue {
  /** `promptOf` gives a job's prompt, null where it is not known. */
  constructor({ promptOf, onCancel, onDismiss }) {
    Object.assign(this, { promptOf, onCancel, onDismiss });
    this.cards = new Map();
  }

  /** Oldest first, since that is the order in which they run. */
  show(jobs) {
    const shown = [...jobs].reverse();
    const cards = new Map(shown.map((job) => [job.id, this.cards.get(job.id) ?? this.card(job.id)]));
    this.cards = cards;
    for (const job of shown) this.update(cards.get(job.id), job);
    byId("queue-section").hidden = !shown.length;
    arrange(
      byId("queue"),
      [...cards.values()].map((card) => card.node),
    );
  }

  card(id) {
    const preview = element("img", { alt: "", hidden: true });
    const title = element("h3");
    const line = element("p", { class: "line" });
    const bar = element("progress", { max: 1, value: 0 });
    const cancel = button("Cancel", () => this.onCancel(id), { class: "quiet" });
    const dismiss = button("Dismiss", () => this.onDismiss(id), { class: "quiet" });
    const text = element("div", { class: "text" }, title, line, bar);
    const node = element(
      "li",
      { class: "card", "data-job": id },
      element("div", { class: "preview" }, preview),
      text,
      cancel,
      dismiss,
    );
    return { node, preview, title, line, bar, cancel, dismiss };
  }

  update(card, job) {
    const prompt = this.promptOf(job) ?? "A job of another tab";
    card.node.dataset.state = job.state;
    put(card.title, prompt || "Without a prompt");
    put(card.line, joined(state(job), job.images.length > 1 && count(job.images.length, "image")));
    card.bar.hidden = !isActive(job);
    card.bar.value = job.state === "running" ? percent(job) / 100 : 0;
    card.bar.setAttribute("aria-label", `Progress of ${prompt}`);
    for (const [one, is] of [
      [card.cancel, isActive(job)],
      [card.dismiss, !isActive(job)],
    ])
      one.hidden = !is;
    card.cancel.setAttribute("aria-label", `Cancel ${prompt}`);
    card.dismiss.setAttribute("aria-label", `Dismiss ${prompt}`);
    card.preview.alt = job.preview ? `Preview of ${prompt}` : "";
    preview(card.preview, job.preview);
  }
}

function put(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

/** One preview is fetched at a time, so that a slow line skips some. */
function preview(image, address) {
  image.hidden = !address;
  if (!address || !image.complete) return;
  const wanted = local(address);
  if (image.getAttribute("src") !== wanted) image.src = wanted;
}
