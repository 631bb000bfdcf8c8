"use strict";
// The map: a canvas that draws the density of all clusters, and the tiles of those that the view needs.

const COVER = 48, COVER_COLUMNS = 16, COVERS = 256; // as crops.py and pages.py write them
const DEEPER = 340; // pixels that a tile takes on the screen before the ones below it are drawn, too
const SHEETS = 48; // sheets of covers in memory
const COVERED = 360; // pixels of the view's left where the title stands

const MapPage = (() => {
  let live = null; // the view that is shown

  async function open(view, [number]) {
    const manifest = Store.peek("manifest");
    const canvas = element("canvas", { tabindex: "0", role: "application", "aria-label": "Map of the clusters: arrows move it, plus and minus zoom" });
    const tip = element("div", { class: "panel tip", hidden: true });
    const pictures = element("button", { type: "button", "aria-label": "Pictures on the map", title: "Pictures (p)", "aria-pressed": "true", onclick: () => live.togglePictures() },
      element("svg", { viewBox: "0 0 24 24" }, element("rect", { x: 3, y: 4, width: 18, height: 16, rx: 3 }), element("path", { svg: true, d: "M3 17l5-5 4 4 3-3 6 5" })));
    const button = (sign, told, act) => element("button", { type: "button", "aria-label": told, title: told, onclick: act }, sign);
    view.append(element("div", { class: "map" }, canvas, about(manifest), tip,
      element("div", { class: "panel zoom" }, button("+", "Zoom in (+)", () => live.camera.zoom(1.9)),
        button("−", "Zoom out (−)", () => live.camera.zoom(1 / 1.9)), button("⤢", "Show all (0)", () => live.showAll()), pictures)));
    live = new MapView(canvas, tip, pictures, manifest);
    await live.begin(number === undefined ? null : Number(number));
    return manifest.title;
  }

  function about(manifest) {
    const axes = manifest.projection === "umap" ? "UMAP of the centers" : "First two principal axes of the centers";
    return element("div", { class: "panel about" }, element("div", { class: "kicker" }, "megaregion"), element("h1", {}, manifest.title),
      element("dl", {}, fact("clusters", count(manifest.clusters)), fact("regions", count(manifest.regions)),
        fact("samples", count(manifest.samples)), fact("tokens", count(manifest.tokens))),
      element("div", { class: "legend" }, `${axes}; larger dots have more regions.`,
        element("div", { class: "ramp" }), "Colour: rank along the third axis."));
  }

  return {
    open,
    close() { live?.end(); live = null; },
    onKey: (key) => live !== null && live.onKey(key),
    // What is on the screen, for whoever measures or tests the page.
    points: () => live.drawn.map(({ id, sx, sy }) => {
      const { left, top } = live.canvas.getBoundingClientRect();
      return { id, x: left + sx, y: top + sy };
    }),
    state: () => live && { points: live.drawn.length, covers: live.covered, scale: live.camera.scale, whole: live.camera.whole },
  };
})();

class MapView {
  constructor(canvas, tip, pictures, manifest) {
    Object.assign(this, { canvas, tip, pictures, manifest, drawn: [], covered: 0, marked: null, hovered: null });
    this.tiles = new Map();
    this.sheets = new Map();
    this.asked = false;
    this.camera = new Camera(canvas, () => this.ask());
    this.resize = new ResizeObserver(() => { this.fit(); this.ask(); });
    this.theme = matchMedia("(prefers-color-scheme: dark)");
    this.onTheme = () => { this.paint(); this.ask(); };
    this.theme.addEventListener("change", this.onTheme);
    canvas.addEventListener("pointermove", (event) => this.hover(event));
    canvas.addEventListener("pointerleave", () => this.point(null));
    canvas.addEventListener("click", () => { if (!this.camera.dragged && this.hovered) location.hash = `#/cluster/${this.hovered.id}`; });
  }

  async begin(number) {
    this.fit();
    this.resize.observe(this.canvas);
    this.paint();
    this.showAll();
    if (number !== null) {
      if (!(Number.isInteger(number) && number >= 0 && number < this.manifest.clusters)) throw new Error(`There is no cluster ${number}`);
      const chunk = await Store.load(`clusters/${Math.floor(number / CHUNK)}`), row = number % CHUNK;
      this.marked = { id: number, x: chunk.x[row] / 65535, y: chunk.y[row] / 65535 };
      this.camera.place(this.marked.x, this.marked.y, this.camera.whole * Math.max(2.5, Math.sqrt(this.manifest.clusters) / 8));
    }
    await this.load("0-0-0");
    this.draw();
    performance.mark("map");
  }

  end() {
    this.resize.disconnect();
    this.theme.removeEventListener("change", this.onTheme);
    this.ended = true;
  }

  fit() {
    const ratio = Math.min(devicePixelRatio || 1, 2);
    this.canvas.width = this.canvas.clientWidth * ratio;
    this.canvas.height = this.canvas.clientHeight * ratio;
    this.ratio = ratio;
  }

  paint() {
    this.colors = readColors();
    this.density = densityPicture(this.colors.density);
  }

  // The part of the map where clusters lie.
  extent() {
    const { side, cells } = this.manifest.density, values = Store.unpack(cells, Uint8Array);
    let x0 = side, y0 = side, x1 = 0, y1 = 0;
    values.forEach((value, i) => {
      if (!value) return;
      x0 = Math.min(x0, i % side); x1 = Math.max(x1, (i % side) + 1);
      y0 = Math.min(y0, Math.floor(i / side)); y1 = Math.max(y1, Math.floor(i / side) + 1);
    });
    return [x0 / side, y0 / side, x1 / side, y1 / side];
  }

  showAll() {
    const [x0, y0, x1, y1] = this.extent(), edge = (this.camera.width > 600 ? 0.06 : 0.12) * Math.max(x1 - x0, y1 - y0) + 0.004;
    this.camera.show(x0 - edge, y0 - edge, x1 + edge, y1 + edge, this.camera.width > 900 ? COVERED : 0);
  }

  ask() {
    if (this.asked || this.ended) return;
    this.asked = true;
    requestAnimationFrame(() => { this.asked = false; if (!this.ended) this.draw(); });
  }

  async load(name) {
    if (this.tiles.has(name)) return;
    this.tiles.set(name, null);
    const content = await Store.load(`map/${name}`);
    this.tiles.set(name, {
      name, covers: content.covers,
      id: Store.unpack(content.id, Int32Array), size: Store.unpack(content.size, Int32Array),
      x: Store.unpack(content.x, Uint16Array), y: Store.unpack(content.y, Uint16Array), tint: Store.unpack(content.tint, Uint8Array),
    });
    if (this.tiles.size > 400) this.tiles.delete([...this.tiles.keys()].find((key) => key !== "0-0-0" && this.tiles.get(key)));
    this.ask();
  }

  // Tiles that the view needs, the highest first; those that are not there yet are sent for.
  needed() {
    const found = [], waiting = [[0, 0, 0]];
    while (waiting.length) {
      const [level, x, y] = waiting.shift(), name = `${level}-${x}-${y}`, side = this.camera.scale / 2 ** level;
      if (!(name in this.manifest.map)) continue;
      const [left, top] = this.camera.toScreen(x / 2 ** level, y / 2 ** level);
      if (left > this.camera.width + 40 || top > this.camera.height + 40 || left + side < -40 || top + side < -40) continue;
      const tile = this.tiles.get(name);
      if (tile) found.push(tile);
      else if (tile === undefined) this.load(name).catch((error) => console.error(error.message));
      if (side > DEEPER) for (const [dx, dy] of [[0, 0], [1, 0], [0, 1], [1, 1]]) waiting.push([level + 1, 2 * x + dx, 2 * y + dy]);
    }
    return found;
  }

  draw() {
    const context = this.canvas.getContext("2d"), { width, height, scale, whole } = this.camera;
    context.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const [left, top] = this.camera.toScreen(0, 0);
    context.globalAlpha = this.manifest.clusters < 2000 ? 0.35 : Math.max(0, 1 - Math.log2(Math.max(scale / whole, 1)) / 6);
    if (context.globalAlpha > 0.02 && this.manifest.clusters >= 300) context.drawImage(this.density, left, top, scale, scale);
    context.globalAlpha = 1;
    this.gather();
    const covers = this.pictures.getAttribute("aria-pressed") === "true" ? this.layCovers() : [];
    this.drawPoints(context);
    for (const cover of covers) this.drawCover(context, cover);
    this.covered = covers.length;
    for (const point of [this.marked && this.screened(this.marked), this.hovered]) if (point) this.drawRing(context, point);
  }

  // The marked cluster where it is drawn, or where it would be if its tile were here already.
  screened(marked) {
    const [sx, sy] = this.camera.toScreen(marked.x, marked.y);
    return this.drawn.find((point) => point.id === marked.id) ?? { sx, sy, r: 6 };
  }

  gather() {
    const points = [];
    for (const tile of this.needed()) {
      for (let i = 0; i < tile.id.length; i++) {
        const [sx, sy] = this.camera.toScreen(tile.x[i] / 65535, tile.y[i] / 65535);
        if (sx < -30 || sy < -30 || sx > this.camera.width + 30 || sy > this.camera.height + 30) continue;
        points.push({ id: tile.id[i], size: tile.size[i], sx, sy, tint: tile.tint[i], tile, place: i, cropped: i < tile.covers });
      }
    }
    const base = Math.min(Math.max(150 / Math.sqrt(points.length + 1), 1.1), 9), middle = Math.max(this.manifest.sizes.median, 1);
    for (const point of points) point.r = base * Math.min(Math.max(0.55 + 0.45 * Math.log2(1 + point.size / middle), 0.45), 2.4);
    this.drawn = points;
  }

  drawPoints(context) {
    // One path for each of 32 shades: changing the colour for every point costs more than the points.
    const shades = new Map();
    for (const point of this.drawn) {
      if (point.covered) continue;
      const shade = point.tint >> 3;
      if (!shades.has(shade)) shades.set(shade, []);
      shades.get(shade).push(point);
    }
    context.globalAlpha = 0.82;
    for (const [shade, points] of shades) {
      context.fillStyle = this.colors.ramp[shade * 8 + 4];
      context.beginPath();
      for (const { sx, sy, r } of points) {
        if (r < 1.3) context.rect(sx - r, sy - r, 2 * r, 2 * r);
        else { context.moveTo(sx + r, sy); context.arc(sx, sy, r, 0, 7); }
      }
      context.fill();
    }
    context.globalAlpha = 1;
  }

  // Clusters that get a picture: in the order of their importance, none over another.
  layCovers() {
    const side = this.manifest.clusters < 200 ? 54 : 44, taken = new Map(), chosen = [];
    for (const point of this.drawn) {
      if (!point.cropped || chosen.length >= 260) continue;
      const column = Math.floor(point.sx / side), row = Math.floor(point.sy / side);
      let free = true;
      for (let dx = -1; dx <= 1 && free; dx++) for (let dy = -1; dy <= 1 && free; dy++) {
        const other = taken.get(`${column + dx},${row + dy}`);
        free = !other || Math.abs(other.sx - point.sx) >= side + 4 || Math.abs(other.sy - point.sy) >= side + 4;
      }
      if (!free) continue;
      taken.set(`${column},${row}`, point);
      const sheet = this.sheet(`${point.tile.name}-${Math.floor(point.place / COVERS)}`);
      if (sheet) chosen.push(Object.assign(point, { covered: true, r: side / 2, sheet, side }));
    }
    return chosen;
  }

  sheet(name) {
    const known = this.sheets.get(name);
    if (known) {
      this.sheets.delete(name);
      this.sheets.set(name, known);
      return known.complete && known.naturalWidth ? known : null;
    }
    const image = new Image();
    image.onload = () => this.ask();
    image.src = `sheets/map/${name}.jpg`;
    this.sheets.set(name, image);
    if (this.sheets.size > SHEETS) this.sheets.delete(this.sheets.keys().next().value);
    return null;
  }

  drawCover(context, { sx, sy, side, sheet, place, tint }) {
    const slot = place % COVERS, x = sx - side / 2, y = sy - side / 2;
    context.save();
    context.beginPath();
    context.roundRect(x, y, side, side, 10);
    context.fillStyle = this.colors.card;
    context.fill();
    context.clip();
    context.drawImage(sheet, (slot % COVER_COLUMNS) * COVER, Math.floor(slot / COVER_COLUMNS) * COVER, COVER, COVER, x, y, side, side);
    context.restore();
    context.strokeStyle = this.colors.ramp[tint];
    context.lineWidth = 2;
    context.stroke();
  }

  drawRing(context, { sx, sy, r, side }) {
    context.strokeStyle = this.colors.accent;
    context.lineWidth = 3;
    context.beginPath();
    if (side) context.roundRect(sx - side / 2 - 3, sy - side / 2 - 3, side + 6, side + 6, 13);
    else context.arc(sx, sy, r + 4, 0, 7);
    context.stroke();
  }

  hover(event) {
    if (this.camera.pointers.size) return this.point(null);
    let best = null, least = Infinity;
    for (const point of this.drawn) {
      const dx = event.offsetX - point.sx, dy = event.offsetY - point.sy;
      const away = point.side ? Math.max(Math.abs(dx), Math.abs(dy)) - point.side / 2 : Math.hypot(dx, dy) - point.r;
      // A picture lies over the dots beside it.
      if (away < 8 && (point.side && away < 0 ? away - 100 : away) < least) { best = point; least = point.side && away < 0 ? away - 100 : away; }
    }
    this.point(best);
  }

  point(point) {
    if (point?.id === this.hovered?.id) return;
    this.hovered = point;
    this.canvas.classList.toggle("pointing", point !== null);
    this.tip.hidden = point === null;
    if (point) {
      const picture = point.cropped && mosaic(point.id, point.size, "");
      this.tip.replaceChildren(...[picture, element("div", {}, element("b", {}, `Cluster ${point.id}`), element("span", {}, plural(point.size, "region")))].filter(Boolean));
      const beside = point.sx > this.camera.width - 260;
      Object.assign(this.tip.style, { left: `${point.sx + (beside ? -point.r - 14 - this.tip.offsetWidth : point.r + 14)}px`, top: `${Math.min(Math.max(point.sy - 50, 8), this.camera.height - 110)}px` });
    }
    this.ask();
  }

  togglePictures() {
    this.pictures.setAttribute("aria-pressed", String(this.pictures.getAttribute("aria-pressed") !== "true"));
    this.ask();
  }

  onKey(key) {
    if (key === "0") this.showAll();
    else if (key === "p") this.togglePictures();
    else return this.camera.onKey(key);
    return true;
  }
}
