/** Elements by id and new ones. Nothing here takes HTML as text, so that no prompt can become markup. */

export const byId = (id) => document.getElementById(id);

/** A new element; attributes that are null or false are left out, `on` holds listeners by event. */
export function element(tag, { on = {}, ...attributes } = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) made.setAttribute(name, written(name, value));
  }
  for (const [event, listener] of Object.entries(on)) made.addEventListener(event, listener);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

// ARIA's truth has a value, HTML's has none.
const written = (name, value) => (value === true && !name.startsWith("aria-") ? "" : value);

export function button(text, click, attributes = {}) {
  return element("button", { type: "button", ...attributes, on: { click } }, text);
}

/** Text of an element, hidden where there is none; the same text is not set again, lest a reader repeats it. */
export function show(target, text) {
  target.hidden = !text;
  if (target.textContent !== text) target.textContent = text;
}

/** Children of a list in the order given; those that stay are not moved, so that they keep the focus. */
export function arrange(parent, children) {
  const wanted = new Set(children);
  for (const child of [...parent.children]) if (!wanted.has(child)) child.remove();
  children.forEach((child, i) => {
    if (parent.children[i] !== child) parent.insertBefore(child, parent.children[i] ?? null);
  });
}
