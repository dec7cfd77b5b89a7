// Notes and stars that stay in this browser, where the service keeps none: by feature, for each layer of each run.
import { make, visible } from "./words.js";

const place = (key) => "mtc-notes " + key;

export function ownNotes(key) {
  try {
    return JSON.parse(localStorage.getItem(place(key))) ?? {};
  } catch {
    return {};  // a browser that keeps nothing, or what another page left there
  }
}

// Throws where the browser keeps nothing.
export function keep(key, feature, { note, star }) {
  const own = ownNotes(key);
  own[feature] = { note, star, changed: new Date().toISOString() };
  if (!note && !star) delete own[feature];
  localStorage.setItem(place(key), JSON.stringify(own));
}

export function shown({ note, star }, tag) {
  const parts = star ? [make("span", "★", { class: "star", role: "img", "aria-label": "starred" }), " "] : [];
  return note ? [...parts, make(tag, visible(note), { class: "note" }), " "] : parts;
}
