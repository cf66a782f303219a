/** Images of files, as data URLs that the server takes. */

import { FieldError } from "./controls.js";

export const TYPES = ["image/png", "image/jpeg", "image/webp"];
const SIDE = 2048; // the longest that the server makes unless it is told otherwise

/**
 * A data URL. PNGs go as they are; others become PNGs, upright as their camera says, since a mask is drawn on what is
 * seen.
 */
export async function readFile(file) {
  if (!TYPES.includes(file.type)) throw new FieldError(`${file.name ?? "This"} is no PNG, JPEG or WebP.`);
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new FieldError(`${file.name ?? "The file"} cannot be read as an image.`);
  }
  const isSmall = Math.max(bitmap.width, bitmap.height) <= SIDE;
  return file.type === "image/png" && isSmall ? dataUrl(file) : resized(bitmap);
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new FieldError("The file cannot be read."));
    reader.readAsDataURL(file);
  });
}

function resized(bitmap) {
  const scale = Math.min(1, SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = newCanvas(
    Math.max(1, Math.round(bitmap.width * scale)),
    Math.max(1, Math.round(bitmap.height * scale)),
  );
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/png");
}

export function newCanvas(width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  return canvas;
}

/** An image of a data URL, decoded. */
export async function decode(address) {
  const image = new Image();
  image.src = address;
  try {
    await image.decode();
  } catch {
    throw new FieldError("The image cannot be read.");
  }
  return image;
}

/** The first image that was dropped or pasted. */
export const imageOf = (transfer) => [...(transfer?.files ?? [])].find((file) => file.type.startsWith("image/"));
