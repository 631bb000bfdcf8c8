"use strict";
// What part of the map is seen, and how pointers, the wheel and keys move it.

class Camera {
  // canvas: what listens. changed: called when the view moved. limits: least and greatest zoom over "all of it".
  constructor(canvas, changed) {
    this.canvas = canvas;
    this.changed = changed;
    this.x = this.y = 0.5;
    this.scale = this.whole = 600; // pixels for the map's whole side
    this.pointers = new Map();
    this.travelled = 0;
    this.goal = null;
    canvas.addEventListener("wheel", (event) => this.onWheel(event), { passive: false });
    canvas.addEventListener("pointerdown", (event) => this.onDown(event));
    canvas.addEventListener("pointermove", (event) => this.onMove(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => this.onUp(event));
    canvas.addEventListener("dblclick", (event) => this.zoom(2.5, event.offsetX, event.offsetY));
  }

  get width() { return this.canvas.clientWidth; }
  get height() { return this.canvas.clientHeight; }
  get dragged() { return this.travelled > 5; }

  toScreen(x, y) { return [(x - this.x) * this.scale + this.width / 2, (y - this.y) * this.scale + this.height / 2]; }

  // Show a rectangle of the map; the left of the view may be covered by `covered` pixels.
  show(x0, y0, x1, y1, covered = 0) {
    const width = Math.max(this.width - covered, 160);
    this.scale = this.whole = Math.min(width / (x1 - x0), this.height / (y1 - y0));
    this.x = (x0 + x1) / 2 - covered / 2 / this.scale;
    this.y = (y0 + y1) / 2;
    this.goal = null;
    this.changed();
  }

  place(x, y, scale) {
    Object.assign(this, { x, y, scale: this.clamp(scale), goal: null });
    this.changed();
  }

  move(dx, dy) {
    this.x += dx / this.scale;
    this.y += dy / this.scale;
    this.changed();
  }

  // Zoom in steps that the eye can follow; the point under (x, y) stays where it is.
  zoom(factor, x = this.width / 2, y = this.height / 2) {
    const running = this.goal !== null;
    this.goal = { scale: this.clamp((this.goal?.scale ?? this.scale) * factor), x, y };
    if (!running) requestAnimationFrame(() => this.approach());
  }

  approach() {
    if (this.goal === null) return;
    const { scale, x, y } = this.goal;
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const near = still || Math.abs(Math.log(scale / this.scale)) < 0.01;
    this.zoomNow(near ? scale / this.scale : (scale / this.scale) ** 0.28, x, y);
    if (near) this.goal = null;
    else requestAnimationFrame(() => this.approach());
  }

  zoomNow(factor, x, y) {
    const next = this.clamp(this.scale * factor);
    const px = x - this.width / 2, py = y - this.height / 2;
    this.x += px / this.scale - px / next;
    this.y += py / this.scale - py / next;
    this.scale = next;
    this.changed();
  }

  clamp(scale) { return Math.min(Math.max(scale, this.whole * 0.6), this.whole * 4000); }

  onWheel(event) {
    event.preventDefault();
    this.goal = null;
    // A mouse's notch is a hundred or so, a trackpad gives many small ones; pinching comes with ctrlKey.
    const amount = event.deltaY * (event.deltaMode === 1 ? 18 : 1) * (event.ctrlKey ? 4 : 1);
    this.zoomNow(Math.exp(-Math.max(-240, Math.min(240, amount)) * 0.0022), event.offsetX, event.offsetY);
  }

  onDown(event) {
    this.canvas.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, event);
    if (this.pointers.size === 1) this.travelled = 0;
    this.goal = null;
  }

  onMove(event) {
    const before = this.pointers.get(event.pointerId);
    if (!before) return;
    this.travelled += Math.hypot(event.offsetX - before.offsetX, event.offsetY - before.offsetY);
    if (this.pointers.size === 2) {
      const other = [...this.pointers.values()].find((pointer) => pointer.pointerId !== event.pointerId);
      const apart = (one) => Math.hypot(one.offsetX - other.offsetX, one.offsetY - other.offsetY);
      this.zoomNow(apart(event) / Math.max(apart(before), 1), other.offsetX, other.offsetY);
    } else if (this.dragged) {
      this.canvas.classList.add("dragging");
      this.move(before.offsetX - event.offsetX, before.offsetY - event.offsetY);
    }
    this.pointers.set(event.pointerId, event);
  }

  onUp(event) {
    this.pointers.delete(event.pointerId);
    this.canvas.classList.remove("dragging");
  }

  // Returns whether the key was ours.
  onKey(key) {
    const step = Math.min(this.width, this.height) / 6;
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    if (moves[key]) this.move(...moves[key]);
    else if (key === "+" || key === "=") this.zoom(1.7);
    else if (key === "-" || key === "−") this.zoom(1 / 1.7);
    else return false;
    return true;
  }
}
