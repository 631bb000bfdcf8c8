"use strict";
// Routes: what stands after # decides the page, so that every page has an address.

const PAGES = {
  __proto__: null, // or #/constructor would find what every object has
  "": ["map", MapPage], map: ["map", MapPage],
  clusters: ["clusters", ClusterList], cluster: ["clusters", ClusterPage],
  tokens: ["tokens", TokenList], token: ["tokens", TokenPage],
  samples: ["samples", SampleList], sample: ["samples", SamplePage],
};

const Router = (() => {
  let current = null, turn = 0;

  async function show() {
    const mine = ++turn, [name = "", ...parts] = location.hash.replace(/^#\/?/, "").split("/").filter(Boolean).map(plainText);
    const view = document.getElementById("view"), next = element("div", {});
    current?.close?.();
    const [tab, page] = PAGES[name] ?? [null, null];
    current = page;
    document.querySelectorAll("nav a").forEach((link) => (link.dataset.page === tab ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current")));
    let title = "Not found";
    try {
      await Store.load("manifest");
      if (!page) throw new Error(`There is no page ${location.hash}`);
      // The map measures its canvas, so it must stand in the document while it is made.
      if (page === MapPage) view.replaceChildren(next);
      title = await page.open(next, parts);
    } catch (error) {
      next.replaceChildren(failure(error));
    }
    // Somebody who was faster has gone elsewhere.
    if (mine !== turn) return;
    view.replaceChildren(next);
    scrollTo(0, 0);
    document.title = `${title} · Atlas`;
    document.body.dataset.shown = location.hash || "#/";
    if (page !== MapPage) view.focus({ preventScroll: true });
  }

  // A part of an address without its % signs, or as it stands where they mean nothing.
  function plainText(part) {
    try { return decodeURIComponent(part); } catch { return part; }
  }

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea, dialog[open]")) return;
    const jumps = { m: "#/", c: "#/clusters", t: "#/tokens", s: "#/samples" };
    if (current?.onKey?.(event.key)) event.preventDefault();
    else if (event.key === "/") { event.preventDefault(); Search.focus(); }
    else if (event.key === "?") document.getElementById("help").showModal();
    else if (event.key === "b") toggleBoxes();
    else if (jumps[event.key]) location.hash = jumps[event.key];
    else if (event.key === "ArrowLeft") document.querySelector("a[rel=prev][href]")?.click();
    else if (event.key === "ArrowRight") document.querySelector("a[rel=next][href]")?.click();
  }

  function begin() {
    addEventListener("hashchange", show);
    addEventListener("keydown", onKey);
    document.getElementById("help-button").addEventListener("click", () => document.getElementById("help").showModal());
    Search.begin();
    show();
  }

  return { begin };
})();

Router.begin();
