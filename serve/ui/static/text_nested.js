// The nested dictionaries side by side: what each prefix leaves unexplained of each token, the features it adds there,
// and which of them refine features that are active on the same token.
import { bar, featureLink, named } from "./text_draw.js";
import { added, DENSE } from "./text_features.js";
import { element, make, many, number, mean, percent, spaced } from "./words.js";

const ROWS = 60, SHOWN = 3;
const rounded = (value) => (value === null ? "–" : value.toFixed(3));

// `answers` are one for each of `prefixes`, which ascend; `pages` how many times ROWS tokens are shown.
export function drawNested(view, prefixes, answers, pages) {
  element("nested").hidden = prefixes.length === 1;
  if (prefixes.length === 1) return;
  element("nested-means").replaceChildren(...prefixes.map((prefix, i) => card(prefix, i, answers)));
  const tokens = [...answers[0].tokens.keys()].filter((t) => !answers[0].is_special[t]);
  const shown = tokens.slice(0, ROWS * pages);
  const head = make("thead", make("tr", [make("th", "Token", { scope: "col" }), ...prefixes.map((prefix, i) =>
    make("th", [make("span", `First ${number(prefix)}`), make("small", i ? `error; features ${number(prefixes[i - 1])} to ${number(prefix - 1)}` : "error; its features")], { scope: "col" }))]));
  const body = make("tbody", shown.map((t) => make("tr", [
    make("th", [make("span", spaced(answers[0].tokens[t]), { class: "token" }), make("small", String(t))], { scope: "row" }),
    ...answers.map((answer, i) => make("td", cell(answer, t, i ? prefixes[i - 1] : 0, view))),
  ], { "data-row": t })));
  element("nested-table").replaceChildren(make("table", [make("caption", make("span", "Relative error of each token by nested dictionary, and the features that each adds")), head, body]));
  markToken(view.token);
  element("nested-more").hidden = shown.length === tokens.length;
  element("nested-more").textContent = `Show more than the first ${shown.length} of ${number(tokens.length)} tokens`;
}

// Which row is that of the chosen token.
export function markToken(token) {
  for (const row of element("nested-table").querySelectorAll("[data-row]")) {
    if (Number(row.dataset.row) === token) row.setAttribute("aria-current", "true");
    else row.removeAttribute("aria-current");
  }
}

function card(prefix, i, answers) {
  const of = (answer) => mean(answer.relative_error), now = of(answers[i]), before = i ? of(answers[i - 1]) : null;
  const l0 = mean(answers[i].l0.filter((_, t) => !answers[i].is_special[t]));
  const gain = before === null || now === null ? "" : `, ${rounded(Math.abs(before - now))} ${now > before ? "more" : "less"} than the one before`;
  return make("div", [make("dt", `First ${number(prefix)}`), make("dd", [make("strong", rounded(now)), make("span", `${number(l0)} active features a token${gain}`)])]);
}

function cell(answer, t, from, view) {
  const error = answer.relative_error[t], { refining, others } = added(answer, t, from, view.facts);
  const lines = [...refining.map((family) => familyLine(family, view)), ...others.map((entry) => make("li", line(entry, view)))];
  const count = refining.reduce((sum, family) => sum + family.children.length, 0) + others.length;
  const found = [make("p", [bar(error ?? 0, 1), make("b", rounded(error)), make("span", ` ${from ? "+ " : ""}${many(count, "feature")}`)], { class: "error" })];
  if (lines.length) found.push(make("ul", lines.slice(0, SHOWN)));
  if (lines.length > SHOWN) found.push(make("details", [make("summary", `${number(lines.length - SHOWN)} more`), make("ul", lines.slice(SHOWN))]));
  return found;
}

const line = (entry, view) => [featureLink(entry.feature, view), " ", make("span", number(entry.value), { class: "value" }), " ", ...named(entry.feature, view)];

// The parent, which a smaller prefix has, and below it what refines it here.
function familyLine({ parent, children }, view) {
  const below = make("ul", children.map((entry) => make("li", line(entry, view))));
  return make("li", [make("span", ["refines ", featureLink(parent, view), " ", ...named(parent, view)], { class: "parent" }), below], { class: "family" });
}
