/** The server's jobs as they are now. */

import { cancelJob, getJobs, listen } from "./api.js";

const LIMIT = 200;
const BUSY = 1000;
const IDLE = 4000;

export const isActive = (job) => job.state === "queued" || job.state === "running";

/**
 * Asks for all jobs now and then, and listens to one, the first that is active: a browser opens six connections to a
 * server for all its tabs together, and an event stream holds one.
 */
export class Jobs {
  constructor({ onChange, onFailure }) {
    this.byId = new Map();
    this.onChange = onChange;
    this.onFailure = onFailure;
    this.stop = null;
    this.heard = null;
    this.turn = 0;
    document.addEventListener("visibilitychange", () => this.refresh());
  }

  /** Newest first. */
  get all() {
    return [...this.byId.values()];
  }

  get active() {
    return this.all.filter(isActive);
  }

  async refresh() {
    const turn = ++this.turn;
    let failure = "";
    let jobs = this.all;
    try {
      jobs = await getJobs(LIMIT);
    } catch (error) {
      failure = error.message;
    }
    if (turn !== this.turn) return; // asked again since, e.g. after a job that this answer does not know
    this.onFailure(failure);
    this.byId = new Map(jobs.map((job) => [job.id, job]));
    this.changed();
    clearTimeout(this.timer);
    if (!document.hidden || this.active.length) this.timer = setTimeout(() => this.refresh(), this.active.length ? BUSY : IDLE);
  }

  /** A job that was just made, or has news. */
  put(job) {
    const isNew = !this.byId.has(job.id);
    if (isNew) this.byId = new Map([[job.id, job], ...this.byId]);
    else this.byId.set(job.id, job);
    this.changed();
    if (isNew) this.refresh(); // busy from now on
  }

  async cancel(id) {
    this.put(await cancelJob(id));
    this.refresh();
  }

  changed() {
    this.follow();
    this.onChange(this.all);
  }

  follow() {
    const first = document.hidden ? undefined : this.active.at(-1);
    if (first?.id === this.heard) return;
    this.stop?.();
    this.stop = null;
    this.heard = first?.id;
    if (!first) return;
    const ended = (job) => {
      this.put(job);
      this.refresh();
    };
    this.stop = listen(first.id, (job) => this.put(job), ended);
  }
}
