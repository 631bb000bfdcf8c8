"use strict";
// The samples that this atlas has: a list of pictures with their boxes, and the page of each.

const SAMPLES_LISTED = 24;

const SampleIndex = (() => {
  let made = null;

  // Numbers and keys of the samples, and where each stands in the list.
  async function load() {
    if (made) return made;
    const content = await Store.load("samples/index"), numbers = Store.unpack(content.n, Uint32Array);
    const places = new Map(Array.from(numbers, (number, place) => [number, place]));
    made = { numbers, keys: content.key, place: (number) => places.get(number), has: (number) => places.has(number) };
    return made;
  }

  async function sample(place) {
    return (await Store.load(`samples/${Math.floor(place / CHUNK)}`))[place % CHUNK];
  }

  return { load, sample };
})();

const imageOf = (sample, place) => `images/${Math.floor(place / DIRECTORY)}/${sample.n}.jpg`;
const kindOf = (region) => (region[0] === 0 ? "object" : "text");
const nameOf = (region) => (region[0] === 0 ? `${region[6]}` : region[6] || "text");
const linkOf = (region) => (region[0] === 0 ? `#/cluster/${region[6]}` : `#/token/${region[7][0]}`);

// Boxes in the image's own pixels; `named` draws the labels, too.
function overlay(sample, named, lit = null) {
  const letter = Math.max(sample.w, sample.h) / 44;
  const boxes = sample.r.map((region, i) => {
    const [, x0, y0, x1, y1] = region, group = [element("rect", { class: kindOf(region), x: x0, y: y0, width: Math.max(x1 - x0, 0), height: Math.max(y1 - y0, 0), rx: letter / 6 })];
    if (named) {
      const width = (nameOf(region).length * 0.62 + 0.8) * letter, left = Math.max(0, Math.min(x0, sample.w - width)), top = y0 > 1.4 * letter ? y0 - 1.35 * letter : y0;
      group.push(element("rect", { class: "tag", x: left, y: top, width, height: 1.35 * letter, rx: letter / 5 }),
        element("text", { x: left + 0.4 * letter, y: top + letter, "font-size": letter }, nameOf(region)));
    }
    const classes = `${kindOf(region)}${lit === null ? "" : lit === i ? " lit" : " dim"}`;
    return named ? element("a", { svg: true, href: linkOf(region), class: classes, "data-region": i }, group) : group;
  });
  // The lit one lies above all others.
  if (named && lit !== null && boxes[lit]) boxes.push(...boxes.splice(lit, 1));
  return element("svg", { class: "overlay", viewBox: `0 0 ${sample.w} ${sample.h}`, preserveAspectRatio: "xMidYMid meet" }, boxes);
}

const SampleList = (() => {
  async function open(view, [number = "0"]) {
    const manifest = Store.peek("manifest"), index = await SampleIndex.load(), page = Number(number), total = index.numbers.length;
    const pages = Math.max(Math.ceil(total / SAMPLES_LISTED), 1);
    if (!(Number.isInteger(page) && page >= 0 && page < pages)) throw new Error(`There is no page ${number}; the last one is ${pages - 1}`);
    const places = Array.from({ length: Math.min(SAMPLES_LISTED, total - page * SAMPLES_LISTED) }, (_, i) => page * SAMPLES_LISTED + i);
    const samples = await Promise.all(places.map((place) => SampleIndex.sample(place)));
    const to = (other) => (other < 0 || other >= pages ? null : `#/samples/${other}`);
    view.append(element("div", { class: "page" }, element("div", { class: "kicker" }, "training data"), element("h1", {}, plural(total, "sample")),
      element("p", { class: "lead" }, total < manifest.samples ? `Drawn at random from ${count(manifest.samples)}. ` : "All there are. ", "Boxes are regions: blue is an object, orange is text."),
      element("div", { class: "controls" }, boxButton(), steps(to(page - 1), to(page + 1), `page ${count(page + 1)} of ${count(pages)}`)),
      element("div", { class: "samples" }, samples.map((sample, i) => card(sample, places[i])))));
    return "Samples";
  }

  function card(sample, place) {
    const image = element("img", { src: imageOf(sample, place), alt: `Sample ${sample.n}`, loading: "lazy", decoding: "async", style: { width: "100%", height: "100%", objectFit: "contain" } });
    return element("a", { class: "card", href: `#/sample/${sample.n}` }, element("div", { class: "frame" }, image, overlay(sample, false)),
      element("div", { class: "caption" }, element("b", {}, sample.key), element("span", {}, plural(sample.r.length, "region"))));
  }

  return { open };
})();

function boxButton() {
  return element("button", { class: "button boxes", type: "button", title: "Boxes (b)", "aria-pressed": String(!document.body.classList.contains("bare")), onclick: toggleBoxes }, "Boxes");
}

function toggleBoxes() {
  const bare = document.body.classList.toggle("bare");
  document.querySelectorAll(".boxes").forEach((button) => button.setAttribute("aria-pressed", String(!bare)));
}

const SamplePage = (() => {
  async function open(view, [text, region]) {
    const manifest = Store.peek("manifest"), index = await SampleIndex.load(), place = index.place(Number(text));
    if (place === undefined) {
      throw new Error(Number(text) < manifest.samples ? `Sample ${text} is not among the ${count(index.numbers.length)} that this atlas shows (--samples 0 shows all)` : `There is no sample ${text}; they are numbered 0 to ${count(manifest.samples - 1)}`);
    }
    const sample = await SampleIndex.sample(place), lit = region === undefined ? null : Number(region);
    const tokens = manifest.tokens && sample.r.some((each) => each[0] === 1) ? await loadTokens() : null;
    const picture = element("div", { class: "picture", style: { aspectRatio: `${sample.w} / ${sample.h}`, maxWidth: `calc(76vh * ${sample.w / sample.h})` } }, element("img", { src: imageOf(sample, place), alt: sample.key }), overlay(sample, true, lit));
    const list = element("ol", { class: "regions" }, sample.r.map((each, i) => element("li", {}, row(each, i, lit), each[0] === 1 && chips(each[7], tokens))));
    // Pointing at a line shows its box.
    const light = (which) => picture.querySelectorAll("a").forEach((box) => {
      box.classList.toggle("lit", Number(box.dataset.region) === which);
      box.classList.toggle("dim", which !== null && Number(box.dataset.region) !== which);
    });
    list.addEventListener("pointerover", (event) => light(Number(event.target.closest("[data-region]")?.dataset.region ?? lit ?? NaN) >= 0 ? Number(event.target.closest("[data-region]")?.dataset.region ?? lit) : null));
    list.addEventListener("pointerleave", () => light(lit));
    const to = (other) => (other < 0 || other >= index.numbers.length ? null : `#/sample/${index.numbers[other]}`);
    const objects = sample.r.filter((each) => each[0] === 0).length;
    view.append(element("div", { class: "page" }, element("div", { class: "kicker" }, element("a", { href: `#/samples/${Math.floor(place / SAMPLES_LISTED)}` }, `sample ${sample.n}`)), element("h1", {}, sample.key),
      element("p", { class: "lead" }, `${sample.w} × ${sample.h} pixels, ${plural(objects, "object")}, ${plural(sample.r.length - objects, "text")}`),
      element("div", { class: "controls" }, boxButton(), steps(to(place - 1), to(place + 1))),
      element("div", { class: "sample" }, picture, list)));
    return `Sample ${sample.n}`;
  }

  function row(region, i, lit) {
    const told = region[0] === 0 ? `Cluster ${region[6]}` : `“${region[6]}”`;
    return element("a", { href: linkOf(region), class: `${kindOf(region)}${i === lit ? " lit" : ""}`, "data-region": i, title: "Score of the region at the right" }, element("b", {}, told), element("small", {}, region[5].toFixed(2)));
  }

  function chips(ids, tokens) {
    return element("div", { class: "chips" }, ids.map((id) => element("a", { class: "chip", href: `#/token/${id}` }, tokens ? pieceText(tokens.piece[id]) : id)));
  }

  return { open };
})();
