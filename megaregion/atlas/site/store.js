"use strict";
// Data comes in chunks: scripts that call atlas(name, content), for a page opened from a file may not fetch.

const Store = (() => {
  const KEPT = 160; // chunks in memory; the least recently used ones go
  const ready = new Map();
  const waiting = new Map();

  function keep(name, content) {
    ready.delete(name);
    ready.set(name, content);
    if (ready.size > KEPT) ready.delete(ready.keys().next().value);
    return content;
  }

  window.atlas = (name, content) => {
    keep(name, content);
    waiting.get(name)?.resolve(content);
    waiting.delete(name);
  };

  function load(name) {
    if (ready.has(name)) return Promise.resolve(keep(name, ready.get(name)));
    if (waiting.has(name)) return waiting.get(name).promise;
    const wait = {};
    wait.promise = new Promise((resolve, reject) => Object.assign(wait, { resolve, reject }));
    waiting.set(name, wait);
    const script = document.createElement("script");
    script.src = `data/${name}.js`;
    const fail = (why) => {
      if (waiting.get(name) !== wait) return;
      waiting.delete(name);
      wait.reject(new Error(`${script.src} ${why}; was the whole folder copied?`));
    };
    script.onerror = () => { script.remove(); fail("cannot be loaded"); };
    script.onload = () => { script.remove(); fail("holds no data"); };
    document.head.append(script);
    return wait.promise;
  }

  // An array from its bytes in base64, little endian as every browser's machine is.
  function unpack(text, Kind) {
    const letters = atob(text);
    const bytes = new Uint8Array(letters.length);
    for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
    return new Kind(bytes.buffer);
  }

  return { load, unpack, peek: (name) => ready.get(name), size: () => ready.size };
})();
