// Elements, and values as people read them.
export const element = (id) => document.getElementById(id);

export function make(tag, content, attributes = {}) {
  const made = document.createElement(tag);
  made.append(...[content].flat());
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

// As mtc.report.format.visible: no character may hide or reorder what follows.
export function visible(string) {
  const signs = { "\n": "⏎", "\r": "␍", "\t": "⇥" };
  return string.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (c) => signs[c] ?? "U+" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0"));
}

// A feature's label, as mtc.report.html.label: it does not break inside its quoted tokens.
const QUOTED = /(?<![^\s(])(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")(?![^\s,;:.)…])/g, UNBROKEN = 26;
export function labelled(string) {
  const shown = visible(string), parts = [];
  let end = 0;
  for (const { 0: quoted, index } of shown.matchAll(QUOTED)) {
    if (quoted.length > UNBROKEN || !quoted.includes(" ")) continue;
    parts.push(shown.slice(end, index), make("span", quoted, { class: "quoted" }));
    end = index + quoted.length;
  }
  return make("span", [...parts, shown.slice(end)], { class: "label" });
}

export const spaced = (string) => (string ? visible(string).replaceAll(" ", "␣") : "⋯");  // within a character of several tokens
export const number = (value) => (value === null ? "undefined" : value.toLocaleString("en", Number.isInteger(value) ? {} : { maximumSignificantDigits: 4 }));
export const percent = (share) => (share === null ? "–" : (100 * share).toLocaleString("en", { maximumFractionDigits: 0 }) + " %");
export const many = (count, thing) => `${number(count)} ${thing}${count === 1 ? "" : "s"}`;

export function mean(values) {
  const known = values.filter((value) => value !== null);
  return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
}
