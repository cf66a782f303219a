/** Messages: for readers of the screen alone, and for all, for a while. */

import { button, byId, element, show } from "./dom.js";

// Milliseconds that a message stays, and one that something can be done about.
const SHOWN = 8000;
const OFFERED = 30000;
let timer;

function announce(text) {
  byId("status").textContent = text;
}

/** A message at the foot of the page, with actions [[text, run], ...]. */
export function toast(text, actions = []) {
  const target = byId("toast");
  clearTimeout(timer);
  const close = () => target.replaceChildren();
  const acting = (run) => () => {
    close();
    run();
  };
  const buttons = actions.map(([name, run]) => button(name, acting(run)));
  target.replaceChildren(
    element("p", {}, text),
    ...buttons,
    button("×", close, { class: "quiet icon", "aria-label": "Close the message" }),
  );
  timer = setTimeout(close, actions.length ? OFFERED : SHOWN);
}

export const banner = (text) => show(byId("banner"), text);

/** Says of a job how far it is, in quarters, where that has changed. */
export function announcer(promptOf) {
  const said = new Map();
  return (job, words, share) => {
    const stages = { queued: `place ${job.place}`, running: `quarter ${Math.floor(share / 25)}` };
    const stage = stages[job.state] ?? job.state;
    if (said.get(job.id) === stage) return;
    said.set(job.id, stage);
    announce(`${promptOf(job) || "Job"}: ${words}`);
  };
}
