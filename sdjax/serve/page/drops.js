/** Images that are dropped or pasted anywhere on the page. */

import { byId } from "./dom.js";
import { imageOf } from "./image-files.js";

const hasFiles = (event) => event.dataTransfer?.types.includes("Files");

/** Fields take what is dropped on them; the rest is `onImage`'s. */
export function takeDrops(onImage) {
  const hint = byId("drop-hint");
  const show = (is) => {
    hint.hidden = !is;
    document.body.classList.toggle("dragging", is);
  };
  addEventListener("dragenter", (event) => show(hasFiles(event)));
  addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
  addEventListener("dragleave", (event) => event.relatedTarget === null && show(false));
  addEventListener("drop", (event) => {
    show(false);
    if (event.defaultPrevented || !hasFiles(event)) return;
    event.preventDefault();
    const file = imageOf(event.dataTransfer);
    if (file) onImage(file);
  });
  addEventListener("paste", (event) => {
    const file = imageOf(event.clipboardData);
    if (file) onImage(file);
  });
  const chooser = byId("settings-file");
  chooser.addEventListener("change", (event) => {
    event.stopPropagation();
    if (chooser.files[0]) onImage(chooser.files[0]);
    chooser.value = "";
  });
}
