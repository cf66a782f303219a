/** Masks as lists of strokes: small to keep, and undone by leaving out the last. */

import { newCanvas } from "./image-files.js";

// Seen over images of most colours; only how opaque it is counts.
const MARK = [224, 33, 138];

/**
 * Draws a mask over what a canvas has: opaque where the image is made anew, else transparent.
 *
 * A stroke is {kind: "line", erase, width, points: [[x, y], ...]} in pixels of the image, {kind: "clear"} or
 * {kind: "invert"}.
 */
export function drawMask(canvas, base, strokes) {
  const context = canvas.getContext("2d");
  context.globalCompositeOperation = "source-over";
  context.clearRect(0, 0, canvas.width, canvas.height);
  if (base) context.drawImage(base, 0, 0, canvas.width, canvas.height);
  for (const stroke of strokes) drawStroke(canvas, stroke);
}

export function drawStroke(canvas, stroke) {
  const context = canvas.getContext("2d");
  context.fillStyle = context.strokeStyle = `rgb(${MARK})`;
  if (stroke.kind === "line") return drawLine(context, stroke);
  if (stroke.kind === "clear") return context.clearRect(0, 0, canvas.width, canvas.height);
  context.globalCompositeOperation = "source-out"; // marked where it was not
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.globalCompositeOperation = "source-over";
}

function drawLine(context, { erase, width, points }) {
  context.globalCompositeOperation = erase ? "destination-out" : "source-over";
  context.lineWidth = width;
  context.lineCap = context.lineJoin = "round";
  context.beginPath();
  context.moveTo(...points[0]);
  // A line to where it begins is a dot.
  for (const point of points.length > 1 ? points.slice(1) : points) context.lineTo(...point);
  context.stroke();
  context.globalCompositeOperation = "source-over";
}

/** A white and black PNG as a data URL; undefined where nothing is marked. */
export function maskUrl(canvas) {
  const { width, height } = canvas;
  const pixels = canvas.getContext("2d").getImageData(0, 0, width, height);
  let marked = 0;
  for (let i = 0; i < pixels.data.length; i += 4) {
    const isMarked = pixels.data[i + 3] >= 128;
    marked += isMarked;
    pixels.data.fill(isMarked ? 255 : 0, i, i + 3);
    pixels.data[i + 3] = 255;
  }
  if (!marked) return undefined;
  const flat = newCanvas(width, height);
  flat.getContext("2d").putImageData(pixels, 0, 0);
  return flat.toDataURL("image/png");
}

/** The mask of an image whose white part is marked, as a canvas that `drawMask` takes as its base. */
export function baseOf(image, width, height) {
  const canvas = newCanvas(width, height);
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(image, 0, 0, width, height);
  const pixels = context.getImageData(0, 0, width, height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    pixels.data.set([...MARK, pixels.data[i] >= 128 ? 255 : 0], i);
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}
