"use strict";
// Conveniences only: everything can be read without.
for (const tools of document.querySelectorAll(".tools")) tools.hidden = false;
const scheme = document.getElementById("scheme");
scheme.addEventListener("change", () => { document.documentElement.style.colorScheme = scheme.value; });

const folds = document.querySelectorAll("main details");
const unfold = document.getElementById("unfold");
unfold.addEventListener("click", () => {
  const open = unfold.getAttribute("aria-pressed") !== "true";
  for (const fold of folds) fold.open = open;
  unfold.setAttribute("aria-pressed", open);
});
let folded = [];
window.addEventListener("beforeprint", () => {
  folded = [...folds].filter((fold) => !fold.open);
  for (const fold of folded) fold.open = true;
});
window.addEventListener("afterprint", () => { for (const fold of folded) fold.open = false; });

function reveal() {
  const target = document.getElementById(location.hash.slice(1));
  const fold = target && target.closest("details");
  if (!fold) return;
  fold.open = true;
  fold.scrollIntoView();
}
window.addEventListener("hashchange", reveal);
reveal();
if (matchMedia("(max-width: 70rem)").matches) document.querySelector("nav details").open = false;

for (const table of document.querySelectorAll("table.searchable")) {
  const body = table.tBodies[0];
  const label = document.createElement("label");
  const input = document.createElement("input");
  label.className = "search";
  label.append("Rows that contain ", input);
  input.type = "search";
  input.addEventListener("input", () => {
    const wanted = input.value.toLowerCase();
    for (const row of body.rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
  table.parentElement.before(label);
  [...table.tHead.rows[0].cells].forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = header.textContent;
    header.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = header.getAttribute("aria-sort") !== "descending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].textContent;
      const order = (a, b) => {
        const [x, y] = [a, b].map((row) => Number(key(row).replaceAll(",", "")));
        return Number.isNaN(x) || Number.isNaN(y) ? key(a).localeCompare(key(b)) : x - y;
      };
      body.append(...[...body.rows].sort(down ? (a, b) => order(b, a) : order));
    });
  });
}
