"use strict";
// The list of all tokens, and the page of each.

const TOKENS_LISTED = 120;
const WORD_START = "▁";

// Pieces that stand for a single byte: the tokenizer's way to write what it has no piece for.
const isByte = (piece) => /^<0x[0-9A-F]{2}>$/.test(piece);

// A piece of text with the mark of a word's start made faint.
function pieceText(piece) {
  const starts = piece.startsWith(WORD_START);
  return [starts && element("span", { class: "start" }, "␣"), starts ? piece.slice(1) : piece];
}

async function loadTokens() {
  const index = await Store.load("tokens/index");
  // The most frequent first; sorted once, and kept with the chunk.
  index.order ??= index.piece.map((_, i) => i).sort((a, b) => index.size[b] - index.size[a] || a - b);
  return index;
}

const TokenList = (() => {
  async function open(view, [number = "0"]) {
    const manifest = Store.peek("manifest"), index = await loadTokens(), page = Number(number);
    const pages = Math.max(Math.ceil(index.piece.length / TOKENS_LISTED), 1);
    if (!(Number.isInteger(page) && page >= 0 && page < pages)) throw new Error(`There is no page ${number}; the last one is ${pages - 1}`);
    const shown = index.order.slice(page * TOKENS_LISTED, (page + 1) * TOKENS_LISTED), most = Math.max(index.size[index.order[0]] ?? 0, 1);
    const to = (other) => (other < 0 || other >= pages ? null : `#/tokens/${other}`);
    view.append(element("div", { class: "page" },
      element("div", { class: "kicker" }, "text classes"), element("h1", {}, plural(manifest.tokens, "token")),
      element("p", { class: "lead" }, manifest.tokens ? `${plural(manifest.usedTokens, "token occurs", "tokens occur")} in text regions; ${count(manifest.tokens - manifest.usedTokens)} never do. ␣ marks the start of a word.` : "This dataset has no text."),
      element("div", { class: "controls" }, element("span", { class: "note" }, "The most frequent first"), steps(to(page - 1), to(page + 1), `page ${count(page + 1)} of ${count(pages)}`)),
      element("div", { class: "pieces" }, shown.map((token) => card(index, token, most)))));
    return "Tokens";
  }

  function card(index, token, most) {
    const size = index.size[token];
    return element("a", { class: "piece", href: `#/token/${token}` }, element("b", {}, pieceText(index.piece[token])),
      element("span", {}, plural(size, "region"), element("i", {}, `#${token}`)),
      element("div", { class: "bar-mark" }, element("i", { style: { width: `${(size / most) * 100}%` } })));
  }

  return { open, card };
})();

const TokenPage = (() => {
  async function open(view, [text]) {
    const manifest = Store.peek("manifest"), token = Number(text);
    if (!(Number.isInteger(token) && token >= 0 && token < manifest.tokens)) {
      throw new Error(manifest.tokens ? `There is no token ${text}; they are numbered 0 to ${count(manifest.tokens - 1)}` : "This dataset has no text");
    }
    const [index, chunk, samples] = await Promise.all([loadTokens(), Store.load(`tokens/${Math.floor(token / CHUNK)}`), SampleIndex.load()]);
    const row = token % CHUNK, size = chunk.size[row], [, members] = chunk.members[row].map(unflatten), piece = index.piece[token];
    const rank = index.order.indexOf(token), bare = piece.replace(WORD_START, "").toLowerCase();
    const related = !bare || isByte(piece) ? [] : index.order.filter((other) => other !== token && index.size[other] && !isByte(index.piece[other]) && index.piece[other].toLowerCase().includes(bare)).slice(0, 18);
    const to = (other) => (other < 0 || other >= index.order.length ? null : `#/token/${index.order[other]}`);
    const most = Math.max(size, ...related.map((other) => index.size[other]), 1);
    view.append(element("div", { class: "page" },
      element("div", { class: "kicker" }, element("a", { href: "#/tokens" }, `token ${token}`)), element("div", { class: "title" }, element("h1", { style: { fontFamily: "var(--mono)", whiteSpace: "pre-wrap" } }, pieceText(piece)), steps(to(rank - 1), to(rank + 1))),
      element("dl", { class: "facts" }, fact("occurs in", count(size), size === 1 ? "text region" : "text regions"), fact("rank", count(rank + 1), `of ${count(index.order.length)}`)),
      size === 0 && element("p", { class: "lead" }, "No text region holds this token."),
      members.length > 0 && element("section", {}, heading(size > members.length ? "Random examples" : `All ${plural(size, "example")}`, size > members.length && `${members.length} of ${count(size)}`),
        element("div", { class: "tiles" }, members.map((member, slot) => memberTile("tokens", token, slot, members.length, member, chunk.sheet[row], samples, chunk.texts[row][slot] ?? "")))),
      related.length > 0 && element("section", {}, heading("Tokens that contain it"), element("div", { class: "pieces" }, related.map((other) => TokenList.card(index, other, most))))));
    return `Token ${piece.replace(WORD_START, "")}`;
  }

  return { open };
})();
