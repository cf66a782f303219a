/** What outlives a reload: settings in localStorage, images, which are too large for it, in IndexedDB. */

const KEY = "sdjax";

/** The kept object; {} where there is none, or the browser keeps nothing. */
export function load() {
  try {
    return JSON.parse(localStorage.getItem(KEY)) ?? {};
  } catch {
    return {};
  }
}

export function save(changes) {
  try {
    localStorage.setItem(KEY, JSON.stringify({ ...load(), ...changes }));
  } catch {
    // Full or forbidden: the page works without.
  }
}

function request(made) {
  return new Promise((resolve, reject) => {
    made.onsuccess = () => resolve(made.result);
    made.onerror = () => reject(made.error);
  });
}

async function store(mode) {
  const opening = indexedDB.open(KEY, 1);
  opening.onupgradeneeded = () => opening.result.createObjectStore("images");
  return (await request(opening)).transaction("images", mode).objectStore("images");
}

export async function loadImages() {
  try {
    return (await request((await store("readonly")).get("form"))) ?? {};
  } catch {
    return {};
  }
}

export async function saveImages(images) {
  try {
    await request((await store("readwrite")).put(images, "form"));
  } catch {
    // As above.
  }
}
