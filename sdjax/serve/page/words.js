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

export function seconds(left) {
  if (left < 1.5) return "about a second left";
  if (left < 90) return `about ${Math.round(left)} s left`;
  return left < 5400 ? `about ${Math.round(left / 60)} min left` : `about ${Math.round(left / 3600)} h left`;
}

export const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
export const percent = ({ done, total }) => (total ? Math.floor((100 * done) / total) : 0);

/** State of a job in one line. */
export function state(job) {
  if (job.state === "queued") return job.place ? `Waiting: ${count(job.place, "job")} before it` : "Waiting: next in the queue";
  if (job.state === "running") return [`${percent(job)} %`, job.eta === null ? null : seconds(job.eta)].filter(Boolean).join(" · ");
  if (job.state === "failed") return `Failed: ${job.error}`;
  return job.state === "cancelled" ? "Cancelled" : `Done: ${count(job.images.length, "image")}`;
}

/** The settings that a person looks for first, in one line. */
export function brief(settings) {
  const { sampler, steps, width, height, seed } = settings;
  const parts = [sampler, steps && `${steps} steps`, width && `${width} × ${height}`, seed !== undefined && `seed ${seed}`];
  return parts.filter(Boolean).join(" · ");
}
