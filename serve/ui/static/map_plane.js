// What the map shows: points on a canvas, which part of them is seen, and what of them is set off from the others.
import { visible } from "./words.js";

const MARGIN = 14, MOST_ZOOM = 80, REACH = 12, NAMED = 40, RELATIVES = 12, NAME_LENGTH = 34;

export class Plane {
  // `points` are the columns of /ui/map.json; `legend` the boxes of the groups, beside dots of their colours.
  constructor(canvas, points, legend) {
    Object.assign(this, { canvas, points, legend, hidden: new Set(), shown: null, scale: 1, left: 0, top: 0, width: 0, height: 0 });
    this.at = new Map(points.feature.map((feature, i) => [feature, i]));
    this.children = new Map();
    points.parent.forEach((parent, i) => {
      if (this.at.has(parent)) this.children.set(parent, [...(this.children.get(parent) ?? []), i]);
    });
    const count = points.feature.length;
    this.radius = count > 20000 ? 1 : count > 3000 ? 1.7 : 2.8;
    this.colour();
  }

  // The colours of the page's scheme, which may change.
  colour() {
    const style = getComputedStyle(document.body);
    [this.ink, this.paper, this.font] = [style.color, style.backgroundColor, `12px ${style.fontFamily}`];
    this.colours = this.legend.map((box) => getComputedStyle(box.parentElement.querySelector(".dot")).color);
    this.redraw();
  }

  // To the canvas's size on the page; the same part stays in the middle.
  resize() {
    const { width, height } = this.canvas.getBoundingClientRect(), ratio = devicePixelRatio || 1, whole = this.isWhole();
    const [x, y] = [this.left + this.width / 2 / this.scale, this.top + this.height / 2 / this.scale];
    [this.canvas.width, this.canvas.height, this.width, this.height] = [width * ratio, height * ratio, width, height];
    if (whole) return this.fit();
    this.look(x, y, this.scale);
  }

  get fitting() {
    return Math.max(1, Math.min(this.width, this.height) - 2 * MARGIN) / this.points.size;
  }

  isWhole() {
    return !this.width || this.scale <= this.fitting * 1.001;
  }

  fit() {
    this.look(this.points.size / 2, this.points.size / 2, this.fitting);
  }

  // So that a place is in the middle; no place outside the map can be.
  look(x, y, scale) {
    const size = this.points.size;
    this.scale = Math.min(Math.max(scale, this.fitting), MOST_ZOOM * this.fitting);
    this.left = Math.min(Math.max(x, 0), size) - this.width / 2 / this.scale;
    this.top = Math.min(Math.max(y, 0), size) - this.height / 2 / this.scale;
    this.redraw();
  }

  // By a factor, around a pixel that stays where it is; out of all is the whole map.
  zoom(factor, px = this.width / 2, py = this.height / 2) {
    const scale = Math.min(this.scale * factor, MOST_ZOOM * this.fitting);
    if (scale <= this.fitting) return this.fit();
    const [x, y] = [this.left + px / this.scale, this.top + py / this.scale];
    this.look(x + (this.width / 2 - px) / scale, y + (this.height / 2 - py) / scale, scale);
  }

  move(dx, dy) {
    this.look(this.left + (this.width / 2 - dx) / this.scale, this.top + (this.height / 2 - dy) / this.scale, this.scale);
  }

  place(i) {
    return [(this.points.x[i] - this.left) * this.scale, (this.points.y[i] - this.top) * this.scale];
  }

  // The index of the point that is nearest to a pixel, within reach; null without one.
  nearest(px, py, reach = REACH) {
    let best = null, least = reach * reach;
    const { x, y, group } = this.points, { left, top, scale } = this;
    for (let i = 0; i < x.length; i++) {
      const dx = (x[i] - left) * scale - px, dy = (y[i] - top) * scale - py, distance = dx * dx + dy * dy;
      if (distance < least && !this.hidden.has(group[i])) [best, least] = [i, distance];
    }
    return best;
  }

  // The indices of a feature's parent, null without one, and of its children, as far as they are on the map.
  relatives(i) {
    const parent = this.at.get(this.points.parent[i]);
    return { parent: parent ?? null, children: this.children.get(this.points.feature[i]) ?? [] };
  }

  family(i) {
    if (i === null) return [];
    const { parent, children } = this.relatives(i);
    return [i, ...(parent === null ? [] : [parent]), ...children];
  }

  show(i) {
    if (i !== this.shown) this.redraw();
    this.shown = i;
  }

  redraw() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.draw();
    });
  }

  draw() {
    const { canvas, points, width, height } = this, context = canvas.getContext("2d"), ratio = devicePixelRatio || 1;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const radius = Math.min(6, this.radius * (this.scale / this.fitting) ** 0.4), seen = this.colours.map(() => []);
    for (let i = 0; i < points.x.length; i++) {
      const [x, y] = this.place(i);
      if (x > -8 && y > -8 && x < width + 8 && y < height + 8 && !this.hidden.has(points.group[i])) seen[points.group[i]].push([x, y, i]);
    }
    context.globalAlpha = this.shown === null ? 0.85 : 0.3;
    seen.forEach((dots, group) => this.dots(context, dots, radius, this.colours[group]));
    context.globalAlpha = 1;
    if (this.shown !== null) this.drawFamily(context, radius);
    const all = seen.flat().map((dot) => dot[2]), named = [];
    for (const i of new Set([...this.family(this.shown).slice(0, RELATIVES), ...(all.length <= NAMED ? all : [])])) this.name(context, i, radius, named);
    canvas.dataset.view = [this.left, this.top, this.scale].join(" ");  // for who drives the page from outside
    canvas.dataset.shown = this.shown === null ? "" : points.feature[this.shown];
  }

  dots(context, dots, radius, colour) {
    context.fillStyle = colour;
    context.beginPath();
    for (const [x, y] of dots) {
      if (radius < 1.5) context.rect(x - radius, y - radius, 2 * radius, 2 * radius);
      else context.moveTo(x + radius, y), context.arc(x, y, radius, 0, 7);
    }
    context.fill();
  }

  drawFamily(context, radius) {
    const [own, ...relatives] = this.family(this.shown), { parent } = this.relatives(own), [x, y] = this.place(own);
    context.strokeStyle = this.ink;
    for (const i of relatives) {
      context.setLineDash(i === parent ? [] : [3, 3]);
      context.lineWidth = i === parent ? 2 : 1;
      context.beginPath();
      context.moveTo(x, y);
      context.lineTo(...this.place(i));
      context.stroke();
    }
    context.setLineDash([]);
    for (const i of [...relatives, own]) {
      const large = i === own ? radius + 4 : radius + 1.5;
      this.dots(context, [this.place(i)], large, this.colours[this.points.group[i]]);
      context.lineWidth = i === own ? 2.5 : 1;
      context.stroke();
    }
  }

  // Unless another name is there already.
  name(context, i, radius, named) {
    const [x, y] = this.place(i), label = visible(this.points.label[i] ?? ""), short = label.length > NAME_LENGTH ? label.slice(0, NAME_LENGTH) + "…" : label;
    const text = `${this.points.feature[i]} ${short}`, right = x > this.width * 0.6;
    Object.assign(context, { font: this.font, textAlign: right ? "right" : "left", textBaseline: "middle", lineWidth: 3, lineJoin: "round", strokeStyle: this.paper, fillStyle: this.ink });
    const from = right ? x - radius - 4 : x + radius + 4;
    const wide = context.measureText(text).width, box = { from: right ? from - wide : from, to: right ? from : from + wide, y };
    if (named.some((other) => box.from < other.to && box.to > other.from && Math.abs(y - other.y) < 15)) return;
    named.push(box);
    context.strokeText(text, from, y);
    context.fillText(text, from, y);
  }
}
