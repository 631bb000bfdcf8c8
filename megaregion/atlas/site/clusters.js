"use strict";
// The list of all clusters, and the page of each.

const CHUNK = 64, ORDER_CHUNK = 4080, LISTED = 48; // as pages.py writes them; LISTED divides ORDER_CHUNK
const FIELDS = 7; // sample, region, cosine and box of a member
const ORDERS = { size: "Largest first", spread: "Loosest first", number: "By number" };

const ClusterList = (() => {
  async function open(view, [order = "size", number = "0"]) {
    const manifest = Store.peek("manifest"), page = Number(number), pages = Math.ceil(manifest.clusters / LISTED);
    if (!Object.hasOwn(ORDERS, order)) throw new Error(`Clusters cannot be ordered by ${order}`);
    if (!(Number.isInteger(page) && page >= 0 && page < pages)) throw new Error(`There is no page ${number}; the last one is ${pages - 1}`);
    const start = page * LISTED;
    const chunk = await Store.load(`orders/${order}/${Math.floor(start / ORDER_CHUNK)}`);
    const ids = Store.unpack(chunk.id, Int32Array), sizes = Store.unpack(chunk.size, Int32Array);
    const means = Store.unpack(chunk.mean, Int16Array), sheets = Store.unpack(chunk.sheet, Uint8Array);
    const cards = [];
    for (let i = start % ORDER_CHUNK; i < Math.min((start % ORDER_CHUNK) + LISTED, ids.length); i++) {
      cards.push(clusterCard(ids[i], sizes[i], sheets[i], means[i] < -1000 ? "" : cosine(means[i])));
    }
    const to = (other) => (other < 0 || other >= pages ? null : `#/clusters/${order}/${other}`);
    view.append(element("div", { class: "page" }, top(manifest),
      element("div", { class: "controls" }, Object.entries(ORDERS).map(([name, told]) => element("a", { class: "button", href: `#/clusters/${name}`, "aria-current": name === order ? "true" : null }, told)),
        steps(to(page - 1), to(page + 1), `page ${count(page + 1)} of ${count(pages)}`)),
      element("div", { class: "tiles" }, cards)));
    return "Clusters";
  }

  function top(manifest) {
    const { bins, smallest, median, largest, empty } = manifest.sizes, most = Math.max(...bins, 1);
    const bars = bins.map((number, i) => element("div", { title: `${plural(number, "cluster")} of ${count(2 ** i)} to ${count(2 ** (i + 1) - 1)} regions`, style: { height: `${(number / most) * 100}%` } }));
    const short = (value) => (value < 1024 ? String(value) : value < 2 ** 20 ? `${value / 1024}k` : `${value / 2 ** 20}M`);
    return element("div", { class: "top" },
      element("div", { class: "words" }, element("div", { class: "kicker" }, "object classes"), element("h1", {}, plural(manifest.clusters, "cluster")),
        element("dl", { class: "facts" }, fact("smallest", count(smallest), "regions"), fact("median", count(median)), fact("largest", count(largest)),
          fact("empty", count(empty)), manifest.knowsCloseness && fact("mean cosine to center", cosine(manifest.closeness)))),
      element("div", { class: "spread" }, element("div", { class: "note" }, "Clusters by size"), element("div", { class: "histogram", role: "img", "aria-label": "Histogram of cluster sizes" }, bars),
        element("div", { class: "axis" }, bins.map((_, i) => element("span", {}, short(2 ** i))))));
  }

  return { open };
})();

function clusterCard(number, size, sheet, note) {
  const picture = sheet ? mosaic(number, size, `Cluster ${number}`) : emptyFrame(size ? "not cropped" : "empty");
  return element("a", { class: "tile", href: `#/cluster/${number}` }, picture,
    element("div", { class: "caption" }, element("b", {}, number), element("span", {}, note)),
    element("div", { class: "caption" }, plural(size, "region")));
}

const ClusterPage = (() => {
  async function open(view, [text]) {
    const manifest = Store.peek("manifest"), number = Number(text);
    if (!(Number.isInteger(number) && number >= 0 && number < manifest.clusters)) {
      throw new Error(`There is no cluster ${text}; they are numbered 0 to ${count(manifest.clusters - 1)}`);
    }
    const [chunk, samples] = await Promise.all([Store.load(`clusters/${Math.floor(number / CHUNK)}`), SampleIndex.load()]);
    const row = number % CHUNK, size = chunk.size[row], [nearest, random] = chunk.members[row].map(unflatten);
    const slots = nearest.length + random.length;
    const grid = (members, first) => element("div", { class: "tiles" }, members.map((member, i) =>
      memberTile("clusters", number, first + i, slots, member, chunk.sheet[row], samples, cosine(member.cosine))));
    const to = (other) => (other < 0 || other >= manifest.clusters ? null : `#/cluster/${other}`);
    view.append(element("div", { class: "page" },
      element("div", { class: "top" },
        element("div", { class: "words" }, element("div", { class: "kicker" }, element("a", { href: "#/clusters" }, "cluster")), element("div", { class: "title" }, element("h1", {}, `Cluster ${number}`), steps(to(number - 1), to(number + 1))),
          element("dl", { class: "facts" }, fact("size", count(size), size === 1 ? "region" : "regions"), chunk.mean[row] >= -1000 && fact("mean cosine to center", cosine(chunk.mean[row])),
            chunk.near[row].length > 1 && fact("nearest cluster", cosine(chunk.near[row][1]), `to ${chunk.near[row][0]}`))),
        locator(chunk.x[row] / 65535, chunk.y[row] / 65535, number)),
      !chunk.sheet[row] && size > 0 && element("p", { class: "note" }, `Crops were made for the ${count(manifest.cropped)} largest clusters only (--sheets).`),
      size === 0 && element("p", { class: "lead" }, "No region has this center as its nearest one."),
      nearest.length > 0 && element("section", {}, random.length ? heading("Nearest to the center", "cosine below each") : heading(`All ${plural(nearest.length, "member")}`, "the nearest first"), grid(nearest, 0)),
      random.length > 0 && element("section", {}, size <= random.length ? heading(`All ${plural(size, "member")}`) : heading("Random members", `${random.length} of ${count(size)}`), grid(random, nearest.length)),
      chunk.near[row].length > 0 && element("section", {}, heading("Neighbouring clusters", "cosine of the centers"),
        element("div", { class: "tiles" }, neighbours(chunk.near[row])))));
    return `Cluster ${number}`;
  }

  function neighbours(flat) {
    const cards = [];
    for (let i = 0; i < flat.length; i += 4) cards.push(clusterCard(flat[i], flat[i + 2], flat[i + 3], cosine(flat[i + 1])));
    return cards;
  }

  function locator(x, y, number) {
    const picture = densitySketch(readColors().density, 416);
    return element("a", { class: "locator", href: `#/map/${number}`, "aria-label": "Show on the map" }, picture,
      element("i", { style: { left: `${x * 100}%`, top: `${y * 100}%` } }), element("span", {}, "show on the map"));
  }

  return { open };
})();

function unflatten(flat) {
  const members = [];
  for (let i = 0; i < flat.length; i += FIELDS) {
    members.push({ sample: flat[i], region: flat[i + 1], cosine: flat[i + 2], box: flat.slice(i + 3, i + FIELDS) });
  }
  return members;
}

// A member of a cluster or a token; a link where its sample can be browsed.
function memberTile(kind, group, slot, slots, member, sheet, samples, note) {
  const told = `Sample ${member.sample}, region ${member.region}`;
  const picture = !sheet ? emptyFrame("not cropped") : member.box[2] > member.box[0] ? frame(kind, group, slot, slots, member.box, told) : emptyFrame("image cannot be read");
  const caption = element("div", { class: "caption" }, element("b", {}, note), element("span", {}, `#${member.sample}`));
  return samples.has(member.sample)
    ? element("a", { class: "tile", href: `#/sample/${member.sample}/${member.region}`, title: told }, picture, caption)
    : element("div", { class: "tile", title: `${told} (not among the samples of this atlas)` }, picture, caption);
}
