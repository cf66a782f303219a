/** Numbers, times and names in words. */

const NAMES = { ip: "IP", t2i: "T2I", rng: "RNG", lora: "LoRA", clip: "CLIP" };
const LABELS = { num_images: "Images", guidance_scale: "Guidance" };

/** `guidance_scale` is "Guidance scale". */
export function label(name) {
  if (name in LABELS) return LABELS[name];
  const words = name.split("_").map((word) => NAMES[word] ?? word);
  return words[0][0].toUpperCase() + words.join(" ").slice(1);
}

export function range({ least = null, most = null }) {
  if (least === null && most === null) return "";
  if (most === null) return `at least ${least}`;
  return least === null ? `at most ${most}` : `${least} to ${most}`;
}

function seconds(left) {
  if (left < 1.5) return "about a second left";
  if (left < 90) return `about ${Math.round(left)} s left`;
  return left < 5400 ? `about ${Math.round(left / 60)} min left` : `about ${Math.round(left / 3600)} h left`;
}

export const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
export const percent = ({ done, total }) => (total ? Math.floor((100 * done) / total) : 0);

export const joined = (...parts) => parts.filter(Boolean).join(" · ");

/** State of a job in one line. */
export function state(job) {
  const left = job.eta === null ? null : seconds(job.eta);
  if (job.state === "queued") return joined(job.place ? `Place ${job.place} in the queue` : "Next in the queue", left);
  if (job.state === "running") return joined(`${percent(job)} %`, left);
  if (job.state === "failed") return `Failed: ${job.error}`;
  return job.state === "cancelled" ? "Cancelled" : `Done: ${count(job.images.length, "image")}`;
}
