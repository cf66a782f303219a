/** The server's jobs as they are now. */

import { cancelJob, getJob, getJobs } from "./api.js";

const LIMIT = 200;
// Milliseconds between two questions: of the jobs at the front, of all while some are active, of all.
const OFTEN = 300;
const BUSY = 1000;
const IDLE = 4000;
const FRONT = 3; // jobs

export const isActive = (job) => job.state === "queued" || job.state === "running";

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

/**
 * Asks, and does not listen to streams of events: a browser opens six connections to a server for all its tabs
 * together, and each stream would hold one.
 */
export class Jobs {
  constructor({ onChange, onFailure }) {
    this.byId = new Map();
    this.onChange = onChange;
    this.onFailure = onFailure;
    this.turn = 0;
    this.isFollowing = false;
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
    if (!document.hidden || this.active.length)
      this.timer = setTimeout(() => this.refresh(), this.active.length ? BUSY : IDLE);
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

  /** News of the first jobs that are active, as long as they are and are seen. */
  async follow() {
    if (this.isFollowing) return;
    this.isFollowing = true;
    while (this.active.length && !document.hidden) {
      await pause(OFTEN);
      await Promise.all(this.active.slice(-FRONT).map(({ id }) => this.renew(id)));
    }
    this.isFollowing = false;
  }

  async renew(id) {
    try {
      const job = await getJob(id);
      this.put(job);
      if (!isActive(job)) this.refresh();
    } catch {
      // What is wrong with the way to the server, `refresh` says.
    }
  }
}
