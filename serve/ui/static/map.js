// The map of features and the outline of their tree, chosen from together. Without this script the page has a drawing of
// the same points.
import { call } from "./call.js";
import { Plane } from "./map_plane.js";
import { element, labelled, make, number } from "./words.js";

const STEP = 1.5, PAN = 60, STILL = 5;
const page = element("map-page"), frame = element("map-frame"), told = element("map-told"), outline = element("outline");
const legend = [...document.querySelectorAll(".map-legend [data-group]")];
const canvas = make("canvas", [], { tabindex: 0, role: "application", "aria-label": "Map of the features", "aria-describedby": "map-keys" });
const tip = make("p", [], { class: "map-tip", hidden: "" });

const tell = (text) => {
  told.hidden = false;
  told.textContent = text;
};
const address = (feature) => `/ui/feature/${feature}${page.dataset.link}`;
const link = (feature) => make("a", String(feature), { href: address(feature) });

let points;
try {
  points = await (await call(page.dataset.points, {}, undefined, tell)).json();
  told.hidden = true;
} catch (error) {
  tell(`The points cannot be had: ${error.message}`);
  throw error;
}

frame.replaceChildren(canvas, tip);
const plane = new Plane(canvas, points, legend);
new ResizeObserver(() => plane.resize()).observe(frame);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plane.colour());
for (const each of [element("map-tools"), element("map-keys"), ...legend]) each.hidden = false;

let chosen = null;

// What the map and the outline set off: what is pointed at, else what is chosen; `i` is an index of the points.
function point(i) {
  const shown = i ?? chosen;
  plane.show(shown);
  outline?.querySelector("[data-marked]")?.removeAttribute("data-marked");
  const entry = shown === null ? null : entryOf(points.feature[shown]);
  if (entry) visibleEntry(entry).dataset.marked = "";
}

const entryOf = (feature) => outline?.querySelector(`a[data-feature="${feature}"]`)?.closest(".entry") ?? null;

function* folds(entry) {
  for (let above = entry.closest("details"); above; above = above.parentElement.closest("details")) yield above;
}

// The entry, or where it is folded away the one that it is folded into.
function visibleEntry(entry) {
  const closed = [...folds(entry)].filter((above) => !above.open).at(-1);
  return closed ? closed.previousElementSibling : entry;
}

// Keeps a feature set off and tells of it; `unfold` brings the outline to it.
function choose(i, unfold = true) {
  chosen = i;
  if (i === null) told.hidden = true;
  else describe(i);
  const entry = i !== null && unfold ? entryOf(points.feature[i]) : null;
  if (entry) {
    for (const above of folds(entry)) above.open = true;
    const offset = entry.getBoundingClientRect().top - outline.getBoundingClientRect().top;
    outline.scrollTop += offset - outline.clientHeight / 2;
  }
  point(null);
}

function describe(i) {
  const feature = points.feature[i], { parent, children } = plane.relatives(i), parts = ["Feature ", link(feature), `, group ${points.group[i]}`];
  if (points.label[i] !== null) parts.push(": ", labelled(points.label[i]));
  if (parent !== null) parts.push("; parent ", link(points.feature[parent]));
  if (children.length) parts.push(`; ${number(children.length)} ${children.length === 1 ? "child" : "children"} on the map`);
  told.hidden = false;
  told.replaceChildren(...parts);
}

function hover(i, x, y) {
  tip.hidden = i === null;
  point(i);
  canvas.style.cursor = i === null ? "" : "pointer";
  if (i === null) return;
  tip.replaceChildren(`${points.feature[i]} `, points.label[i] === null ? "no samples" : labelled(points.label[i]));
  const right = x > plane.width / 2, low = y > plane.height / 2;
  Object.assign(tip.style, {
    left: right ? "" : `${x + 14}px`, right: right ? `${plane.width - x + 14}px` : "",
    top: low ? "" : `${y + 10}px`, bottom: low ? `${plane.height - y + 10}px` : "", margin: 0,
  });
}

const open = (i, aside) => (aside ? window.open(address(points.feature[i]), "_blank", "noopener") : location.assign(address(points.feature[i])));

// Pointers: one drags or clicks, two pinch.
const down = new Map();
let moved = 0;
const at = (event) => [event.clientX - frame.getBoundingClientRect().left - 1, event.clientY - frame.getBoundingClientRect().top - 1];
const spread = () => {
  const [[ax, ay], [bx, by]] = [...down.values()];
  return { x: (ax + bx) / 2, y: (ay + by) / 2, apart: Math.hypot(ax - bx, ay - by) || 1 };
};

canvas.addEventListener("pointerdown", (event) => {
  if (event.button) return;
  down.set(event.pointerId, at(event));
  if (down.size === 1) moved = 0;
  canvas.setPointerCapture(event.pointerId);
});
canvas.addEventListener("pointermove", (event) => {
  const [x, y] = at(event), last = down.get(event.pointerId);
  if (!last) return event.pointerType === "touch" ? undefined : hover(plane.nearest(x, y), x, y);
  const before = down.size === 2 ? spread() : null;
  moved += Math.hypot(x - last[0], y - last[1]);
  down.set(event.pointerId, [x, y]);
  if (before) {
    const now = spread();
    plane.zoom(now.apart / before.apart, now.x, now.y);
    plane.move(now.x - before.x, now.y - before.y);
  } else if (moved > STILL && !plane.isWhole()) {
    plane.move(x - last[0], y - last[1]);
  }
  if (moved > STILL) tip.hidden = true;
});
canvas.addEventListener("pointerup", (event) => {
  const alone = down.delete(event.pointerId) && !down.size;
  const i = alone && moved <= STILL ? plane.nearest(...at(event), event.pointerType === "touch" ? 24 : undefined) : null;
  if (i !== null && event.pointerType === "touch" && i !== chosen) choose(i);  // a finger covers many: what it hit is told first
  else if (i !== null) open(i, event.ctrlKey || event.metaKey);
  touchable();
});
canvas.addEventListener("pointercancel", (event) => down.delete(event.pointerId));
canvas.addEventListener("pointerleave", () => hover(null));
canvas.addEventListener("wheel", (event) => {
  if (event.deltaY > 0 && plane.isWhole()) return;  // then the page scrolls
  event.preventDefault();
  plane.zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.002)), ...at(event));
  touchable();
}, { passive: false });

// One finger scrolls the page as long as there is nothing to move.
function touchable() {
  canvas.style.touchAction = plane.isWhole() ? "pan-y" : "none";
}
touchable();

function zoom(factor) {
  const around = chosen === null ? [] : plane.place(chosen);
  const inside = around.length && around.every((v, axis) => v >= 0 && v <= [plane.width, plane.height][axis]);
  plane.zoom(factor, ...(inside ? around : []));
  touchable();
}

const KEYS = {
  "+": () => zoom(STEP), "=": () => zoom(STEP), "-": () => zoom(1 / STEP), 0: () => (plane.fit(), touchable()),
  ArrowLeft: () => plane.move(PAN, 0), ArrowRight: () => plane.move(-PAN, 0),
  ArrowUp: () => plane.move(0, PAN), ArrowDown: () => plane.move(0, -PAN),
  " ": () => choose(plane.nearest(plane.width / 2, plane.height / 2, Infinity)),
  Enter: () => chosen !== null && open(chosen, false), Escape: () => choose(null),
};
canvas.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey || !(event.key in KEYS)) return;
  event.preventDefault();
  KEYS[event.key]();
});
element("closer").addEventListener("click", () => zoom(STEP));
element("farther").addEventListener("click", () => zoom(1 / STEP));
element("whole").addEventListener("click", KEYS[0]);

element("find").addEventListener("submit", (event) => {
  event.preventDefault();
  const feature = Number(element("sought").value), i = plane.at.get(feature);
  if (i === undefined) return tell(`Feature ${feature} is not on the map: it never fired on the analysed text.`);
  plane.look(points.x[i], points.y[i], Math.max(plane.scale, plane.fitting * 4));
  touchable();
  choose(i);
});
for (const box of legend) {
  box.addEventListener("change", () => {
    plane.hidden[box.checked ? "delete" : "add"](Number(box.dataset.group));
    plane.redraw();
  });
}

const indexOf = (target) => plane.at.get(Number(target.closest("li")?.querySelector("[data-feature]")?.dataset.feature)) ?? null;
outline?.addEventListener("focusin", (event) => choose(indexOf(event.target), false));
outline?.addEventListener("pointerover", (event) => point(indexOf(event.target)));
outline?.addEventListener("pointerleave", () => point(null));
