// Notes of this browser in the list of features.
import { ownNotes, shown } from "./notes.js";
import { element, make } from "./words.js";

const MOST = 500;  // features that a page may name
const told = element("own-notes"), own = ownNotes(told.dataset.key);

for (const row of document.querySelectorAll("tr[data-feature]")) {
  const note = own[row.dataset.feature];
  if (note) row.querySelector(".noted").replaceChildren(...shown(note, "span"));
}

function list(features, words) {
  const named = features.slice(0, MOST).map((feature) => ["feature", feature]);
  return features.length ? [make("a", `${words} (${features.length})`, { href: `${told.dataset.link}&${new URLSearchParams(named)}` })] : [];
}

const all = Object.keys(own);
if (all.length) {
  const file = new Blob([JSON.stringify(own, null, 1) + "\n"], { type: "application/json" });
  told.replaceChildren(make("span", "In this browser only:"),
    ...list(all.filter((feature) => own[feature].star), "Starred"), ...list(all, "All noted"),
    make("a", "Download notes.json", { href: URL.createObjectURL(file), download: "notes.json" }));
  told.hidden = false;
}
