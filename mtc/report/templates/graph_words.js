"use strict";
// What is said of an attribution graph: names, figures, what stands above it and beside it. All texts are set as text.
const graphWords = (() => {
  const LISTED = 10;

  // As mtc.report.format: no character may hide or reorder what follows.
  function visible(string) {
    const signs = { "\n": "⏎", "\r": "␍", "\t": "⇥" };
    return string.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (c) => signs[c] ?? "U+" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0"));
  }
  const shortLabel = (string) => visible(string).replace(/ \((\d+ %|\d of \d)\)/g, "").replace(/^no single token; (most often )?/, "").trim();
  const spaced = (string) => (string ? visible(string).replaceAll(" ", "␣") : "⋯");
  function number(value) {
    if (value === null || value === undefined) return "not measured";
    if (!Number.isFinite(Number(value))) return "undefined";
    return Number(value).toLocaleString("en", Number.isInteger(value) ? {} : { maximumSignificantDigits: 3 });
  }
  const signed = (value) => (value < 0 ? "−" : "+") + number(Math.abs(value));
  const percent = (share) => `${number(100 * share)} %`;

  function make(tag, content = [], attributes = {}) {
    const made = document.createElement(tag);
    made.append(...[content].flat().filter((part) => part !== null));
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  }
  const token = (text) => make("span", spaced(text), { class: "token" });

  // A mark's names: short below it, long where it is spoken of.
  function words(graph, folded) {
    const hidden = (mark) => mark.members.length - (mark.own === null ? 0 : 1);
    const own = (mark) => graph.nodes[mark.own ?? mark.members[0]];
    // The text of a feature that is not active here may be known from where it is.
    const texts = new Map(graph.nodes.filter((n) => n.kind === "feature" && n.text).map((n) => [`${n.layer}.${n.feature}`, n.text]));
    const textOf = (mark) => texts.get(`${mark.layer}.${mark.feature}`) ?? "";

    function short(mark) {
      const more = mark.kind === "feature" && hidden(mark) ? ` +${hidden(mark)}` : "";
      switch (mark.kind) {
        case "feature": return (shortLabel(textOf(mark)) || `#${mark.feature}`) + more;
        case "logit": return `${spaced(own(mark).text ?? "")} ${percent(own(mark).probability ?? 0)}`;
        case "others": return mark.members.length === 1 ? "1 other" : `${mark.members.length} others`;
        case "group": return visible(mark.title) || "group";
        default: return "";
      }
    }

    const known = new Map();
    function long(mark) {
      if (!known.has(mark)) known.set(mark, full(mark));
      return known.get(mark);
    }

    function full(mark) {
      const at = `token ${mark.token} ${spaced(graph.tokens[mark.token])}`, label = visible(textOf(mark)).trim(), named = label && `: ${label}`;
      switch (mark.kind) {
        case "feature": return `Feature ${mark.feature} of layer ${mark.layer} at ${at}${named}${hidden(mark) ? `; ${hidden(mark)} folded into it` : ""}`;
        case "error": return `Error of layer ${mark.layer} at ${at}`;
        case "embedding": return `Embedding of ${at}`;
        case "logit": return `Next token ${spaced(own(mark).text ?? "")}, probability ${percent(own(mark).probability ?? 0)}`;
        case "others": return `${mark.members.length} other feature${mark.members.length === 1 ? "" : "s"} of layer ${mark.layer} at ${at}`;
        default: return `Group ${visible(mark.title)}, ${mark.members.length} nodes`;
      }
    }
    return { short, long, hidden, own, textOf };
  }

  // What stands above the graph: the prompt, what is explained, and how much is.
  function head(graph) {
    const targets = graph.nodes.filter((node) => node.target);
    const weighs = (node) => (Math.abs(node.influence - node.probability) > 1e-4 * node.influence ? `, weighing ${number(node.influence)}` : "");
    const named = targets.map((node) => make("li", node.kind === "logit"
      ? [token(node.text ?? ""), ` ${percent(node.probability ?? 0)}${weighs(node)}`]
      : `feature ${node.feature} of layer ${node.layer} at token ${node.token}`));
    const cells = (found) => [number(found.features), number(found.replacement), number(found.completeness), percent(1 - found.replacement), percent(found.special_errors)];
    const row = (score, name, found) => make("tr", [
      make("th", name, { scope: "row" }), ...cells(found).map((cell) => make("td", cell, { class: "n" })),
    ], { "data-prefix": score.prefix });
    const rows = graph.scores.flatMap((score) => [
      row(score, `the first ${number(score.prefix)}`, score),
      ...(score.folded.features > score.features ? [row(score, `with later ones folded in: ${number(score.folded.nodes)} nodes`, score.folded)] : []),
    ]);
    const columns = ["Features a layer", "Active in the graph", "Replacement score", "Completeness score", "Errors' influence", "of it special tokens'"];
    const table = make("table", [
      make("caption", make("span", "How much each resolution explains; the rest is error")),
      make("thead", make("tr", columns.map((c, n) => make("th", c, { scope: "col", ...(n ? { class: "n" } : {}) })))), make("tbody", rows),
    ]);
    return make("div", [
      make("p", [make("strong", "Prompt "), ...graph.tokens.flatMap((text) => [token(text), "\u200b"])], { class: "graph-prompt" }),
      make("div", [make("strong", targets.length === 1 || targets.some(weighs) ? "Explained " : "Explained, each by its probability "), make("ul", named)], { class: "graph-targets" }),
      make("div", table, { class: "scroll", tabindex: 0, role: "region", "aria-label": "Scores" }),
    ], { class: "graph-head" });
  }

  // What is known of one mark, with links to what it reads and what reads it; `act` are the page's own functions.
  function panel(graph, folded, mark, act) {
    const say = words(graph, folded), node = mark.own === null ? null : graph.nodes[mark.own];
    const facts = [];
    const fact = (name, value) => { if (value !== null && value !== undefined && value !== "") facts.push(make("div", [make("dt", name), make("dd", value)])); };
    if (mark.kind === "feature") {
      fact("Label", visible(say.textOf(mark)).trim());
      fact("Activation", node ? (node.activation === null ? null : number(node.activation)) : "not active here");
    }
    if (node && node.value !== null) fact(node.kind === "logit" ? "Logit less the mean" : "Pre-activation", number(node.value));
    if (node && node.bias !== null) fact("Of that, biases", number(node.bias));
    if (mark.kind === "logit") fact("Probability", percent(node?.probability ?? 0));
    fact("Influence", `${number(mark.influence)}${mark.members.length > 1 ? ", summed" : ""}`);
    if (node && node.group !== null) fact("Nested group", `${node.group}`);
    if (node?.ancestors.length) fact("Refines", node.ancestors.map((each) => `feature ${each}`).join(", which refines "));
    const title = make("h3", say.long(mark), { tabindex: -1 });
    const buttons = [];
    const button = (text, action, key = "") => {
      const made = make("button", text, { type: "button", ...(key ? { "aria-keyshortcuts": key } : {}) });
      made.addEventListener("click", action);
      buttons.push(made);
    };
    if (act.unfolds(mark)) button(`Unfold ${say.hidden(mark)}`, () => act.unfold(mark), "F");
    const container = act.container(mark);
    if (container) button(container.startsWith("x") ? "Fold into the layer's others" : `Fold into feature ${container.split(".")[3]}`, () => act.foldInto(container), "F");
    const address = node?.kind === "feature" && act.featureAddress(node);
    const link = address ? make("p", make("a", `All that is known of feature ${node.feature}`, { href: address })) : null;
    const answer = make("p", [], { role: "status", class: "graph-answer" });
    if (act.ablate && mark.kind !== "logit" && !mark.target) button(act.ablateLabel, async () => {
      answer.replaceChildren("…");
      try {
        answer.replaceChildren((await act.ablate(mark.members.map((i) => graph.nodes[i]))) ?? "");
      } catch (error) {
        answer.replaceChildren(String(error.message ?? error));
      }
    });
    const name = mark.kind === "group" ? nameForm("Name", "Rename", mark.title, (text) => act.rename(mark, text)) : null;
    if (mark.kind === "group") button("Ungroup", () => act.ungroup(mark));
    button(act.picked(mark) ? "Leave out of a group" : "Choose for a group", () => act.pick(mark), "Space");
    return [
      title, make("p", buttons, { class: "graph-buttons" }), answer, name, make("dl", facts), link,
      ...list("Strongest inputs", folded.edges.filter((e) => e.to === mark), (e) => e.from, mark, act, say),
      ...list("Strongest outputs", folded.edges.filter((e) => e.from === mark), (e) => e.to, mark, act, say),
      ...(mark.members.length > 1 ? members(graph, mark) : []),
    ].filter((part) => part !== null);
  }

  function list(title, edges, other, mark, act, say) {
    if (!edges.length) return [];
    const sorted = [...edges].sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
    const items = sorted.slice(0, LISTED).map((edge) => {
      const at = other(edge), link = make("a", say.long(at), { href: act.address(at), "data-at": at.name });
      link.addEventListener("click", (event) => {
        if (event.ctrlKey || event.metaKey || event.shiftKey) return;
        event.preventDefault();
        act.select(at.name, true);
      });
      const part = at === edge.from && mark.incoming > 0 ? `, ${percent(Math.abs(edge.weight) / mark.incoming)} of what it reads` : "";
      return make("li", [link, " ", make("span", signed(edge.weight), { class: edge.weight < 0 ? "minus" : "plus" }), part]);
    });
    const left = sorted.length - LISTED;
    return [make("h4", title), make("ol", items), ...(left > 0 ? [make("p", `and ${number(left)} more`, { class: "remark" })] : [])];
  }

  function members(graph, mark) {
    const shown = mark.members.slice(0, 40).map((i) => graph.nodes[i]).map((node) => {
      const where = `${node.layer === null ? "" : `layer ${node.layer}, `}token ${node.token}`;
      const what = node.kind === "feature" ? `feature ${node.feature}` : node.kind;
      return make("li", `${what}, ${where}${node.text ? `: ${visible(node.text).trim()}` : ""}`);
    });
    if (mark.members.length > 40) shown.push(make("li", `and ${number(mark.members.length - 40)} more`));
    return [make("details", [make("summary", `Its ${number(mark.members.length)} nodes`), make("ul", shown)])];
  }

  // A text field with a button, which hands on what was typed.
  function nameForm(label, verb, text, done) {
    const field = make("input", [], { type: "text", maxlength: 80, value: text });
    const form = make("form", [make("label", [`${label} `, field]), " ", make("button", verb)], { class: "graph-name" });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      done(field.value.trim() || "group");
    });
    return form;
  }

  return { make, visible, spaced, number, percent, signed, words, head, panel, nameForm };
})();
