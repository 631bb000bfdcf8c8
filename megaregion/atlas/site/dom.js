"use strict";
// Small builders that every page uses. Text from data only ever becomes text, never markup.

const COLUMNS = 6; // tiles in each row of a sheet, as pages.py writes it
const DIRECTORY = 256; // sheets of a folder, as pages.py writes it

function element(tag, attributes = {}, ...children) {
  const svg = ["svg", "rect", "g", "text"].includes(tag) || attributes.svg;
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false || name === "svg") continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(made.style, value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

const count = (number) => number.toLocaleString("en-US");
const cosine = (permille) => (permille < -1000 ? "–" : (permille / 1000).toFixed(3));
const plural = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;

// Slots of a group's sheet: the nearest members, then random ones if those are not all there are.
function slotsOf(size, nearest) {
  const { members, knowsCloseness } = Store.peek("manifest");
  const row = Math.min(size, members);
  return nearest && knowsCloseness && size > members ? 2 * row : row;
}

// One tile of a group's sheet, with the region's box drawn in it; `zoom` looks closer at its middle.
function frame(kind, group, slot, slots, box, told, zoom = 1) {
  const rows = Math.ceil(slots / COLUMNS), side = 100 * zoom, shift = 50 * (zoom - 1);
  const image = element("img", {
    src: `sheets/${kind}/${Math.floor(group / DIRECTORY)}/${group}.jpg`,
    alt: told, loading: "lazy", decoding: "async", draggable: "false",
    style: {
      width: `${COLUMNS * side}%`, height: `${rows * side}%`,
      left: `${-(slot % COLUMNS) * side - shift}%`, top: `${-Math.floor(slot / COLUMNS) * side - shift}%`,
    },
  });
  const marks = [];
  if (box && box[2] > box[0]) {
    const [x0, y0, x1, y1] = box.map((edge) => edge / 10);
    const style = { left: `${x0}%`, top: `${y0}%`, width: `${x1 - x0}%`, height: `${y1 - y0}%` };
    marks.push(element("i", { class: "dim", style }), element("i", { class: "box", style }));
  }
  return element("div", { class: "frame" }, image, marks);
}

// The first four tiles of a cluster: more telling than one.
function mosaic(number, size, told) {
  const slots = slotsOf(size, true), shown = Math.min(size, 4) < 4 ? 1 : Math.min(slots, 4);
  const parts = Array.from({ length: shown }, (_, slot) => frame("clusters", number, slot, slots, null, slot ? "" : told, 1.3));
  return element("div", { class: shown < 4 ? "mosaic single" : "mosaic" }, shown < 4 ? parts[0] : parts);
}

const emptyFrame = (text) => element("div", { class: "frame empty" }, text);

function fact(name, value, unit) {
  return element("div", {}, element("dt", {}, name), element("dd", {}, value, unit && element("small", {}, ` ${unit}`)));
}

function heading(title, note) {
  return element("div", { class: "heading" }, element("h2", {}, title), note && element("small", {}, note));
}

// Links to what comes before and after; the arrow keys follow them, too.
function steps(previous, next, text) {
  const link = (to, sign, told, rel) => element("a", {
    class: "button", rel, "aria-label": told, "aria-disabled": to === null ? "true" : null, href: to ?? null,
  }, sign);
  return element("div", { class: "steps" }, text && element("span", {}, text),
    link(previous, "←", "Previous", "prev"), link(next, "→", "Next", "next"));
}

function failure(error) {
  return element("div", { class: "page" }, element("div", { class: "failed", role: "alert" }, error.message));
}

function readColors() {
  const style = getComputedStyle(document.documentElement);
  const value = (name) => style.getPropertyValue(name).trim();
  const stops = value("--ramp").split(",").map((stop) => parseColor(stop.trim()));
  const ramp = Array.from({ length: 256 }, (_, i) => {
    const place = (i / 255) * (stops.length - 1), low = Math.min(Math.floor(place), stops.length - 2);
    return `rgb(${stops[low].map((part, c) => Math.round(part + (stops[low + 1][c] - part) * (place - low))).join()})`;
  });
  return { ramp, density: parseColor(value("--density")), card: value("--card"), ink: value("--ink"), accent: value("--accent"), page: value("--page") };
}

const parseColor = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

// The density of the whole map as a picture, [side x side]; where there is none it is transparent.
function densityPicture(color) {
  const { side, cells } = Store.peek("manifest").density;
  const values = Store.unpack(cells, Uint8Array);
  const pixels = new ImageData(side, side);
  for (let i = 0; i < values.length; i++) {
    pixels.data.set(color, 4 * i);
    pixels.data[4 * i + 3] = values[i] ? 40 + values[i] * 0.8 : 0;
  }
  const canvas = element("canvas", { width: side, height: side });
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

// The same for a small picture: where few clusters lie, single cells would not be seen.
function densitySketch(color, pixels) {
  const { side, cells } = Store.peek("manifest").density, few = Store.peek("manifest").clusters < 3000;
  if (!few) return densityPicture(color);
  const canvas = element("canvas", { width: pixels, height: pixels }), context = canvas.getContext("2d");
  const radius = Math.max(pixels / 26 / Math.log2(2 + Store.peek("manifest").clusters), pixels / side);
  context.fillStyle = `rgb(${color.join()})`;
  Store.unpack(cells, Uint8Array).forEach((value, i) => {
    if (!value) return;
    context.beginPath();
    context.arc(((i % side) + 0.5) * (pixels / side), (Math.floor(i / side) + 0.5) * (pixels / side), radius, 0, 7);
    context.fill();
  });
  return canvas;
}
