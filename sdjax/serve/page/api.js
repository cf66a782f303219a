/** The server's API. Addresses are relative, so that the page also works below a path of a proxy. */

/** What the server, or the way to it, says is wrong. */
class ApiError extends Error {
  constructor(message, { option = null, status = 0 } = {}) {
    super(message);
    this.option = option;
    this.status = status;
  }
}

const SAID = { 401: "You are not signed in. Load the page again.", 404: "The server no longer has it." };

async function call(path, init) {
  let answer;
  try {
    answer = await fetch(path, init);
  } catch {
    throw new ApiError("The server does not answer.");
  }
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) throw failure(answer, body);
  return body;
}

function failure(answer, body) {
  const wait = answer.headers.get("Retry-After");
  const detail = Array.isArray(body.detail) ? body.detail.map((one) => one.msg).join("; ") : body.detail;
  let text = detail || SAID[answer.status] || `The server answered with ${answer.status}.`;
  if (answer.status === 503 && wait) text += `. Try again in ${wait} s.`;
  return new ApiError(text, { option: body.option ?? null, status: answer.status });
}

/** An address that the server gave, relative to the page. */
export const local = (address) => address.replace(/^\//, "");

export const getModels = async () => (await call("v1/models")).data;
export const getOptions = (model) => call(model ? `v1/options?model=${encodeURIComponent(model)}` : "v1/options");
export const getJobs = async (limit) => (await call(`v1/jobs?limit=${limit}`)).jobs;
export const getJob = (id) => call(`v1/jobs/${encodeURIComponent(id)}`);
export const cancelJob = (id) => call(`v1/jobs/${encodeURIComponent(id)}`, { method: "DELETE" });

export function postJob(body) {
  const headers = { "Content-Type": "application/json" };
  return call("v1/jobs", { method: "POST", headers, body: JSON.stringify(body) });
}

export function readSettings(file) {
  const body = new FormData();
  body.append("file", file);
  return call("v1/settings", { method: "POST", body });
}

export async function fetchImage(address) {
  const answer = await fetch(local(address)).catch(() => null);
  if (!answer?.ok) throw new ApiError(SAID[404]);
  return answer.blob();
}
