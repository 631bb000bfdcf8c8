"use strict";
// Search by number of a cluster, by text of a token, by number or key of a sample.

const Search = (() => {
  const FOUND = 8;
  let input, list, chosen = 0, round = 0;

  function begin() {
    input = document.getElementById("search");
    list = document.getElementById("found");
    input.addEventListener("input", show);
    input.addEventListener("focus", show);
    input.addEventListener("blur", () => setTimeout(hide, 150));
    input.addEventListener("keydown", onKey);
    input.form.addEventListener("submit", (event) => { event.preventDefault(); go(); });
  }

  async function find(text) {
    const manifest = Store.peek("manifest"), found = [], wanted = text.toLowerCase();
    const number = /^#?\d{1,15}$/.test(text) ? Number(text.replace("#", "")) : null;
    if (number !== null && number < manifest.clusters) found.push([`#/cluster/${number}`, `Cluster ${number}`, "cluster"]);
    const samples = await SampleIndex.load();
    if (number !== null && samples.has(number)) found.push([`#/sample/${number}`, `Sample ${number}`, "sample"]);
    if (manifest.tokens) {
      const tokens = await loadTokens(), rest = [];
      for (const token of tokens.order) {
        const piece = tokens.piece[token].replace(WORD_START, "").toLowerCase();
        if (piece === wanted) rest.unshift([token, 2]);
        else if (rest.length < 3 * FOUND && piece.startsWith(wanted)) rest.push([token, 1]);
      }
      rest.sort((a, b) => b[1] - a[1]);
      for (const [token] of rest.slice(0, FOUND)) found.push([`#/token/${token}`, tokens.piece[token].replace(WORD_START, "␣"), `token, ${plural(tokens.size[token], "region")}`]);
    }
    for (let i = 0, left = 4; i < samples.keys.length && left && number === null; i++) {
      if (samples.keys[i].toLowerCase().includes(wanted)) { found.push([`#/sample/${samples.numbers[i]}`, samples.keys[i], "sample"]); left--; }
    }
    return found.slice(0, 2 * FOUND);
  }

  async function show() {
    const text = input.value.trim(), mine = ++round;
    if (!text) return hide();
    const found = await find(text);
    if (mine !== round || document.activeElement !== input) return;
    chosen = 0;
    const { clusters } = Store.peek("manifest");
    const lines = found.map(([href, name, kind], i) => element("li", { role: "option", "aria-selected": String(i === 0), onpointerdown: (event) => { event.preventDefault(); leave(href); } },
      element("a", { href, tabindex: "-1" }, name, element("small", {}, kind))));
    list.replaceChildren(...(lines.length ? lines : [element("li", { class: "none" }, `Nothing found. Clusters are numbered 0 to ${count(clusters - 1)}.`)]));
    list.hidden = false;
    input.setAttribute("aria-expanded", "true");
  }

  function hide() {
    round++;
    list.hidden = true;
    input.setAttribute("aria-expanded", "false");
  }

  function leave(href) {
    input.value = "";
    input.blur();
    hide();
    location.hash = href;
  }

  // Enter goes to the first hit, also before the list has come up.
  async function go() {
    const text = input.value.trim();
    if (!text) return;
    const found = await find(text);
    if (found.length) leave(found[Math.min(chosen, found.length - 1)][0]);
  }

  function onKey(event) {
    const lines = [...list.querySelectorAll("[role=option]")];
    if (event.key === "Escape") { input.value = ""; input.blur(); }
    if (!lines.length || !["ArrowDown", "ArrowUp"].includes(event.key)) return;
    event.preventDefault();
    chosen = (chosen + (event.key === "ArrowDown" ? 1 : lines.length - 1)) % lines.length;
    lines.forEach((line, i) => line.setAttribute("aria-selected", String(i === chosen)));
    lines[chosen].scrollIntoView({ block: "nearest" });
  }

  return { begin, focus: () => { input.focus(); input.select(); } };
})();
