/** An image's record as values of the form. */

const RENAMED = { index: "first_index" };
const NEEDS = { strength: "init_image", feather: "mask" };

/**
 * Values of the form that make an image again, and the images that are missing for it: no record holds another image,
 * but `sent` does, the options that this tab sent for it.
 */
export function valuesOf(settings, imageNames, sent = {}) {
  const values = Object.fromEntries(Object.entries(settings).map(([name, value]) => [RENAMED[name] ?? name, value]));
  if (!values.first_index) delete values.first_index;
  const missing = imageNames.filter((name) => name in values && !sent[name]);
  for (const name of imageNames) values[name] = sent[name];
  for (const [name, image] of Object.entries(NEEDS)) {
    if (values[name] === undefined || values[image]) continue;
    delete values[name]; // which has no effect without the image
    missing.push(image);
  }
  return { values, missing: [...new Set(missing)] };
}
