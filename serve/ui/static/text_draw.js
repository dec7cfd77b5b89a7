// What the text page shows of an answer: the tokens, a token's features, the text's. `view` is what is shown: answer,
// facts, token, feature, link (the end of the addresses of features' own pages), withDense and all (every row listed).
import { DENSE, entries, fold, ranked } from "./text_features.js";
import { element, labelled, make, many, number, percent, spaced, visible } from "./words.js";

const LISTED = 50, STRENGTHS = 5;

// To a feature's own page; a plain click shows it beside the text.
export const featureLink = (feature, view) => make("a", String(feature), { href: `/ui/feature/${feature}${view.link}`, "data-feature": feature });

export function named(feature, view) {
  const row = view.facts.of(feature), label = row?.note ?? row?.label ?? null, found = [];
  if (view.facts.massive(feature)) found.push(make("span", "massive", { class: "badge", title: "most of its activation falls on massive tokens" }), " ");
  if (view.facts.dense(feature)) found.push(make("span", "dense", { class: "badge", title: `fires on more than ${percent(DENSE)} of all tokens` }), " ");
  if (label !== null) found.push(labelled(label));
  return found;
}

export const bar = (value, most) => make("meter", [], { min: 0, max: most, value, "aria-hidden": "true" });

// How strong each token is, by its strongest feature or by the one that is chosen: null of none, or from 1 to STRENGTHS.
function strengths(view) {
  const { answer, facts, feature } = view;
  const tops = answer.tokens.map((_, t) => {
    const own = entries(answer, t, facts);
    return (feature === null ? own[0] : own.find((entry) => entry.feature === feature))?.value ?? 0;
  });
  const order = tops.filter((value) => value > 0).sort((a, b) => a - b), most = order.at(-1) ?? 0;
  const step = (value) => {
    const share = feature === null ? (order.lastIndexOf(value) + 1) / order.length : value / most;
    return Math.min(STRENGTHS, Math.max(1, Math.ceil(STRENGTHS * share)));
  };
  return { tops, most, steps: tops.map((value) => (value > 0 ? step(value) : null)) };
}

export function drawTokens(view) {
  const { answer, token, feature } = view, place = element("tokens");
  const focused = place.contains(document.activeElement), { tops, most, steps } = strengths(view);
  place.replaceChildren();
  answer.tokens.forEach((string, t) => {
    const special = answer.is_special[t];
    const label = special ? string : string.trim() ? visible(string) : spaced(string);
    const button = make("button", label, { type: "button", "aria-pressed": t === token, tabindex: t === (token ?? 0) ? 0 : -1, "data-token": t });
    button.className = special ? "special" : steps[t] === null ? "none" : "a" + steps[t];
    button.title = special ? "special token: no features" : steps[t] === null ? "not active" : `activation ${number(tops[t])}`;
    place.append(button);
    if (string.includes("\n")) place.append(make("br", []));
  });
  if (focused) place.querySelectorAll("button")[token ?? 0].focus();
  element("clear").hidden = feature === null;
  element("legend").textContent = feature === null
    ? "Coloured by each token's strongest feature, in fifths of this text's tokens: the darker, the stronger."
    : most > 0 ? `Coloured by feature ${feature}: the darker, the stronger; at most ${number(most)}.` : `Feature ${feature} is not active in this text.`;
}

function table(caption, rows, view, headers, cells) {
  const head = make("thead", make("tr", headers.map((h, i) => (h ? make("th", h, { scope: "col", class: i > 1 ? "n" : "" }) : make("td", [])))));
  const body = make("tbody", rows.map((row) => {
    const line = make("tr", [make("th", featureLink(row.feature, view), { scope: "row" }),
      make("td", [...named(row.feature, view), ...copies(row, view)]), ...cells(row).map((cell) => make("td", cell, { class: "n" }))]);
    if (row.feature === view.feature) line.setAttribute("aria-current", "true");
    return line;
  }));
  return make("table", [make("caption", make("span", caption)), head, body], { class: "choice" });
}

function copies(row, view) {
  if (!row.copies?.length) return [];
  const lines = row.copies.map((copy) => make("li", [featureLink(copy.feature, view), ` ${number(copy.value)} on ${many(copy.tokens, "token")}`]));
  return [make("details", [make("summary", row.copies.length === 1 ? "and a copy of it" : `and ${number(row.copies.length)} copies of it`), make("ul", lines)])];
}

function textTable(caption, rows, view) {
  return table(caption, rows, view, ["Feature", "Label", "", "Of its maximum", "Strongest", "Tokens"], (row) => [
    row.share === null ? [] : bar(row.share, 1), percent(row.share), number(row.value), number(row.tokens)]);
}

// The features of the text: those nearest to their own maximum first.
export function drawList(view) {
  const rows = ranked(view.answer, view.facts), { listed, dense, massive } = fold(rows, view.facts, view.withDense);
  const shown = view.all ? listed : listed.slice(0, LISTED), place = element("list"), opened = place.querySelector(".massive")?.open;
  const most = shown.length < listed.length ? `The first ${shown.length} of ${number(listed.length)} features` : many(listed.length, "feature");
  const known = rows.some((row) => row.share !== null);
  const order = known ? "by their activation's share of their own maximum in the analysed text" : "by activation";
  place.replaceChildren(textTable(`${most}, ${order}`, shown, view));
  if (massive.length) {
    const folded = make("details", [make("summary", `${many(massive.length, "feature")} of massive tokens`), textTable("Of massive tokens", massive, view)], { class: "massive" });
    folded.open = opened ?? false;
    place.append(folded);
  }
  element("all").hidden = shown.length === listed.length;
  element("all").textContent = `List all ${number(listed.length)}`;
  element("dense-count").textContent = dense.length ? `, ${number(dense.length)} here` : ", none here";
}

// All features of a token.
export function drawToken(view, t) {
  const place = element("of-token"), title = element("of-token-title");
  element("of-token-part").hidden = t === null;
  if (t === null) return place.replaceChildren();
  const own = entries(view.answer, t, view.facts);
  title.textContent = `Token ${t}, ${spaced(view.answer.tokens[t])}: ${many(own.length, "feature")}`;
  // Not the first row's: features of massive tokens come last, however strong.
  const most = Math.max(...own.map((row) => row.value));
  place.replaceChildren(...(own.length ? [table("Strongest first", own, view, ["Feature", "Label", "", "Activation", "Of its maximum"],
    (row) => [bar(row.value, most), number(row.value), percent(row.share)])] : []));
}
