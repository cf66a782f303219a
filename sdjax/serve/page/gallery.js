/** All images that the server has, newest first. */

import { local } from "./api.js";
import { arrange, byId, element } from "./dom.js";

const PAGE = 60;

/** Images of jobs, [{key, job, number, url, settings, parameters}], newest job first. */
export function imagesOf(jobs) {
  return jobs.flatMap((job) =>
    job.images.flatMap((image, number) =>
      image ? [{ key: `${job.id}/${number}`, job: job.id, number, ...image }] : [],
    ),
  );
}

export class Gallery {
  constructor({ onOpen }) {
    this.tiles = new Map();
    this.most = PAGE;
    this.images = [];
    this.onOpen = onOpen;
    byId("more-images").addEventListener("click", () => {
      this.most += PAGE;
      this.show(this.images);
    });
  }

  show(images) {
    this.images = images;
    const shown = images.slice(0, this.most);
    this.tiles = new Map(shown.map((image) => [image.key, this.tiles.get(image.key) ?? this.tile(image)]));
    arrange(byId("gallery"), [...this.tiles.values()]);
    byId("more-images").hidden = shown.length === images.length;
  }

  tile(image) {
    const prompt = image.settings.prompt || "Without a prompt";
    const { width, height } = image.settings;
    const shown = element("img", {
      src: local(image.url),
      alt: `${prompt}, seed ${image.settings.seed}`,
      width,
      height,
      loading: "lazy",
    });
    const open = element(
      "button",
      { type: "button", class: "tile", on: { click: () => this.onOpen(image.key) } },
      shown,
    );
    return element("li", { "data-image": image.key }, open, element("p", { class: "caption", title: prompt }, prompt));
  }

  focus(key) {
    this.tiles.get(key)?.querySelector("button").focus();
  }
}
