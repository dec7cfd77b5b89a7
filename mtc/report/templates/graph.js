"use strict";
// An attribution graph to look at and to work with: `mtcGraph.draw(graph, options)`. Loaded after its
// neighbours graph_fold.js, graph_layout.js and graph_words.js.
const mtcGraph = (() => {
  const { make, number, percent, spaced } = graphWords;
  const SVG = "http://www.w3.org/2000/svg";
  const FIRST_MARKS = 60, FIRST_EDGES = 140, MOST_EDGES = 3000, MOST_LABELS = 80;
  const STEPS = Array.from({ length: 96 }, (_, i) => (i + 5) / 100);
  const KEYS = [
    ["← →", "the mark before, the next, row after row"], ["↑ ↓", "the nearest mark above, below"],
    ["Enter", "open a mark: what is known of it, beside the graph"], ["Esc", "back to the graph; nothing is chosen"],
    ["I, O", "to the strongest input, output"], ["F", "unfold a mark, or fold it back"],
    ["Space", "choose a mark for a group, or not"], ["G", "group what is chosen"], ["Home, End", "the first mark, the last"],
  ];

  function drawn(tag, attributes = {}, content = []) {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...[content].flat());
    return made;
  }

  // The state as a fragment and back; parameters that are not the graph's stay.
  const OWN = ["prefix", "nodes", "edges", "open", "at", "group"];
  function toFragment(state, fragment) {
    const found = new URLSearchParams(fragment);
    for (const [name, value] of [...found]) if (OWN.includes(name) || !value) found.delete(name);
    found.set("prefix", state.prefix);
    found.set("nodes", state.nodes);
    found.set("edges", state.edges);
    if (state.open.size) found.set("open", [...state.open].sort().join("~"));
    if (state.at) found.set("at", state.at);
    for (const group of state.groups) found.append("group", [group.name.replaceAll("%", "%25").replaceAll("~", "%7E"), ...group.names].join("~"));
    return "#" + found;
  }
  function fromFragment(graph, fragment, first) {
    const found = new URLSearchParams(fragment.replace(/^#/, ""));
    const share = (name) => { const value = Number(found.get(name)); return value > 0 && value <= 1 ? value : first[name]; };
    const prefix = Number(found.get("prefix"));
    return {
      prefix: graph.scores.some((score) => score.prefix === prefix) ? prefix : first.prefix,
      nodes: share("nodes"), edges: share("edges"), at: found.get("at"),
      open: new Set((found.get("open") ?? "").split("~").filter(Boolean)),
      groups: found.getAll("group").map((text) => text.split("~")).filter((parts) => parts.length > 1)
        .map(([name, ...names]) => ({ name: name.replaceAll("%7E", "~").replaceAll("%25", "%"), names })),
    };
  }

  // Draws a graph, an object of the shape of mtc.results.Graph, into `container`. Options:
  //   container: an element; by default the one with the id "graph".
  //   featureUrl: where a feature's page is, with {run}, {layer} and {feature}; by default the container's
  //     data-feature-url, if it has one.
  //   ablate(nodes): called with the graph's nodes that a mark stands for; the text or element it gives, or promises, is
  //     shown. Without it there is no such button. ablateLabel: the button's text.
  // Returns { state(), destroy() }.
  function draw(graph, options = {}) {
    const container = options.container ?? document.getElementById("graph");
    const prefixes = graph.scores.map((score) => score.prefix);
    const first = firstState(graph, prefixes);
    let state = fromFragment(graph, location.hash, first);
    let view = null;  // what is shown: folded, pruned, placed
    let picked = new Set(), focused = null, written = location.hash;

    const page = skeleton(graph, prefixes);
    container.replaceChildren(page.root);

    // From here on: what changes the state, and then what shows it.
    function change(changes, focus = null) {
      state = { ...state, ...changes };
      written = toFragment(state, location.hash.replace(/^#/, ""));
      history.replaceState(history.state, "", written);
      show(focus);
    }

    const containerOf = (mark) => {
      if (mark.kind !== "feature" || mark.target) return null;
      const chain = view.folded.chains[mark.members[0]], next = chain[chain.indexOf(mark.name) + 1];
      return next !== undefined && state.open.has(next) ? next : null;
    };
    const act = {
      unfolds: (mark) => ["feature", "others"].includes(mark.kind) && !mark.target && mark.members.some((i) => i !== mark.own),
      unfold: (mark) => {
        const child = mark.own === null ? view.folded.chains[mark.members[0]] : null;
        const next = child ? child[child.indexOf(mark.name) - 1] : mark.name;
        change({ open: new Set([...state.open, mark.name]), at: state.at === mark.name ? next : state.at }, next);
      },
      container: containerOf,
      foldInto: (name) => {
        const open = new Set([...state.open].filter((each) => each !== name));
        change({ open, at: state.at ? name : null }, name);
      },
      featureAddress: (node) => (options.featureUrl ?? container.dataset.featureUrl)?.replace(/\{(run|layer|feature)\}/g, (_, part) => encodeURIComponent({ run: graph.run_id ?? "", layer: node.layer, feature: node.feature }[part])),
      ablate: options.ablate, ablateLabel: options.ablateLabel ?? "Take it out of the model",
      address: (mark) => toFragment({ ...state, at: mark.name }, location.hash.replace(/^#/, "")),
      select: (name, reading) => { change({ at: name }); if (reading) page.panel.querySelector("h3")?.focus(); },
      rename: (mark, text) => change({ groups: state.groups.map((group, n) => (mark.name === `h.${n}` ? { ...group, name: text } : group)) }),
      pick: (mark) => pick(mark.name), picked: (mark) => picked.has(mark.name),
      ungroup: (mark) => change({ groups: state.groups.filter((_, n) => mark.name !== `h.${n}`), at: null }, graphFold.nameOf(graph.nodes[mark.members[0]])),
    };

    function group(text) {
      const gone = new Set([...picked].filter((name) => name.startsWith("h.")).map((name) => Number(name.slice(2))));
      const names = [...picked].flatMap((name) => (name.startsWith("h.") ? state.groups[Number(name.slice(2))].names : [name]));
      const groups = [...state.groups.filter((_, n) => !gone.has(n)), { name: text, names }];
      picked = new Set();
      change({ groups, at: `h.${groups.length - 1}` }, `h.${groups.length - 1}`);
    }

    function pick(name) {
      if (picked.has(name)) picked.delete(name);
      else picked.add(name);
      show(name);
    }

    function show(focus = null) {
      const held = focus ?? (page.plot.contains(document.activeElement) ? focused : null);
      const shape = JSON.stringify([state.prefix, [...state.open], state.groups]);  // the sliders of shares leave it
      const folded = view?.shape === shape ? view.folded : graphFold.fold(graph, state);
      picked = new Set([...picked].filter((name) => folded.marks.has(name)));
      const chosen = folded.marks.get(state.at) ?? null;
      const { marks, edges } = graphFold.prune(folded, state.nodes, state.edges, new Set([state.at, focus, ...picked]));
      view = { shape, folded, marks, edges: edges.slice(0, MOST_EDGES), chosen, say: graphWords.words(graph, folded) };
      const axis = 46, width = Math.max(260, page.scroll.clientWidth - axis - 2);
      const tokens = graph.tokens.map(spaced);
      view.placed = graphLayout.place(marks, tokens, graph.layers, width, MOST_LABELS, view.say.short);
      view.spots = new Map(view.placed.spots.map((spot) => [spot.mark.name, spot]));
      paint(page, graph, view, { picked, tokens, axis });
      page.fill(state, view, graph);
      const order = inOrder(view);
      focused = [held, state.at, focused].find((name) => view.spots.has(name)) ?? order[0]?.mark.name ?? null;
      rove(focused);
      if (held !== null && focused !== null) nodeOf(focused).focus({ preventScroll: focus === null });
      light(null);
      aside();
    }

    function aside() {
      const parts = [];
      if (picked.size) {
        const none = make("button", "Choose none", { type: "button" });
        none.addEventListener("click", () => { picked.clear(); show(); });
        parts.push(make("section", [
          make("p", make("strong", picked.size === 1 ? "1 mark is chosen; a group takes two" : `${number(picked.size)} marks are chosen`)),
          picked.size > 1 ? graphWords.nameForm("Name", "Group", "", group) : null,
          make("ul", [...picked].map((name) => make("li", view.say.long(view.folded.marks.get(name))))), none,
        ], { class: "graph-picked", "aria-label": "Chosen for a group" }));
      }
      if (view.chosen) parts.push(...graphWords.panel(graph, view.folded, view.chosen, act));
      else parts.push(make("p", "Open a mark, by a click or with the arrow keys and Enter, to see what it reads and what reads it. Shift and a click, or the space bar, choose several for a group.", { class: "remark" }));
      page.panel.replaceChildren(...parts);
    }

    const nodeOf = (name) => [...page.plot.querySelectorAll("[data-name]")].find((element) => element.dataset.name === name);
    function rove(name) {
      for (const element of page.plot.querySelectorAll("[data-name]")) element.setAttribute("tabindex", element.dataset.name === name ? 0 : -1);
    }

    // What a mark reads and what reads it stands out while it has the focus or the pointer, or is chosen.
    function light(name) {
      const lit = name ?? (view.chosen && view.spots.has(view.chosen.name) ? view.chosen.name : null), near = new Set([lit]);
      page.plot.classList.toggle("lit", lit !== null);
      for (const path of page.plot.querySelectorAll("[data-from]")) {
        const on = path.dataset.from === lit || path.dataset.to === lit;
        path.classList.toggle("on", on);
        if (on) near.add(path.dataset.from).add(path.dataset.to);
      }
      for (const element of page.plot.querySelectorAll("[data-name]")) element.classList.toggle("on", near.has(element.dataset.name));
      tip(page.plot, name === null ? null : view.spots.get(name), view);
    }

    const pointed = (event) => event.target.closest?.("[data-name]")?.dataset.name ?? null;
    page.plot.addEventListener("click", (event) => {
      const name = pointed(event);
      if (name === null) return change({ at: null });
      if (event.shiftKey) {
        if (!picked.size && state.at && state.at !== name && view.folded.marks.has(state.at)) picked.add(state.at);
        pick(name);
      } else change({ at: name }, name);
    });
    page.plot.addEventListener("dblclick", (event) => {
      const mark = view.folded.marks.get(pointed(event));
      if (mark && act.unfolds(mark)) act.unfold(mark);
    });
    page.plot.addEventListener("pointerover", (event) => light(pointed(event)));
    page.plot.addEventListener("pointerleave", () => light(null));
    page.plot.addEventListener("focusin", (event) => { focused = pointed(event) ?? focused; rove(focused); light(focused); });
    page.plot.addEventListener("focusout", () => light(null));
    page.plot.addEventListener("keydown", (event) => {
      const mark = view.folded.marks.get(focused);
      if (!mark || event.ctrlKey || event.metaKey || event.altKey) return;
      const step = stepOf(view, view.spots.get(focused), event.key);
      if (step) nodeOf(step.mark.name).focus();
      else if (event.key === "Enter") act.select(focused, true);
      else if (event.key === " ") pick(focused);
      else if (event.key === "Escape") { picked.clear(); change({ at: null }, focused); }
      else if (event.key === "f" && act.unfolds(mark)) act.unfold(mark);
      else if (event.key === "f" && containerOf(mark)) act.foldInto(containerOf(mark));
      else if (event.key === "g" && picked.size > 1) page.panel.querySelector(".graph-picked input")?.focus();
      else return;
      event.preventDefault();
    });
    page.panel.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && focused !== null) nodeOf(view.chosen && view.spots.has(view.chosen.name) ? view.chosen.name : focused)?.focus();
    });
    page.listen((changes) => change(changes));

    let width = 0;
    const watch = new ResizeObserver(() => { if (page.scroll.clientWidth !== width) { width = page.scroll.clientWidth; show(); } });
    const moved = () => {
      if (location.hash === written || /^#[^=]+$/.test(location.hash)) return;  // the latter leads to a part of the page
      [written, state] = [location.hash, fromFragment(graph, location.hash, first)];
      show();
    };
    addEventListener("hashchange", moved);
    show();
    page.scroll.scrollLeft = page.scroll.scrollWidth;  // the last token is what the graph is about
    width = page.scroll.clientWidth;
    watch.observe(page.scroll);
    return {
      state: () => structuredClone(state),
      destroy: () => { watch.disconnect(); removeEventListener("hashchange", moved); container.replaceChildren(); },
    };
  }

  // What a graph first looks like: the smallest dictionary, and no more than can be looked at.
  function firstState(graph, prefixes) {
    const folded = graphFold.fold(graph, { prefix: prefixes[0] });
    const rest = [...folded.marks.values()].filter((mark) => !mark.target);
    const nodes = graphFold.shareFor(rest, (mark) => mark.influence, FIRST_MARKS, STEPS);
    const { edges } = graphFold.prune(folded, nodes, 1);
    return { prefix: prefixes[0], nodes, edges: graphFold.shareFor(edges, graphFold.strength, FIRST_EDGES, STEPS), open: new Set(), at: null, groups: [] };
  }

  const inOrder = (view) => [...view.placed.spots].sort((a, b) => b.y - a.y || a.x - b.x);

  // Where a key leads from a mark.
  function stepOf(view, spot, key) {
    const order = inOrder(view), at = order.indexOf(spot);
    const beside = { ArrowRight: order[at + 1], ArrowLeft: order[at - 1], Home: order[0], End: order.at(-1) };
    if (key in beside) return beside[key];
    if (key === "ArrowUp" || key === "ArrowDown") {
      const beyond = order.filter((each) => (key === "ArrowUp" ? each.y < spot.y : each.y > spot.y));
      const cost = (each) => Math.abs(each.y - spot.y) + 0.35 * Math.abs(each.x - spot.x);
      return beyond.sort((a, b) => cost(a) - cost(b))[0];
    }
    if (key !== "i" && key !== "o") return undefined;
    const [own, other] = key === "i" ? ["to", "from"] : ["from", "to"];
    const edges = view.edges.filter((edge) => edge[own] === spot.mark);
    const strongest = edges.sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight))[0];
    return strongest && view.spots.get(strongest[other].name);
  }

  // The elements that stay: what is above, the sliders, the drawing, what is beside it.
  function skeleton(graph, prefixes) {
    const root = make("div", [], { class: "graph" });
    const slider = (label, attributes) => {
      const input = make("input", [], { type: "range", ...attributes }), output = make("output");
      return { input, output, row: make("label", [make("span", [`${label} `, output]), input]) };
    };
    const prefix = slider("Nested dictionary:", { min: 0, max: prefixes.length - 1, step: 1 });
    prefix.input.disabled = prefixes.length === 1;
    const nodes = slider("Nodes that hold", { min: 0.05, max: 1, step: 0.01 });
    const edges = slider("Edges that hold", { min: 0.05, max: 1, step: 0.01 });
    const foldAll = make("button", "Fold all", { type: "button" });
    const count = make("p", [], { role: "status", class: "remark graph-count" });
    const keys = make("details", [make("summary", "Keys"), make("dl", KEYS.map(([key, what]) => make("div", [make("dt", make("kbd", key)), make("dd", what)])))], { class: "graph-keys" });
    const rows = drawn("svg", { class: "graph-rows", "aria-hidden": "true" });
    const plot = drawn("svg", { class: "graph-plot", role: "group", "aria-label": "Attribution graph; arrow keys move between marks, Enter opens one" });
    const tokens = drawn("svg", { class: "graph-tokens", "aria-hidden": "true" });
    const scroll = make("div", [rows, plot, make("div", "layer ↑", { class: "graph-corner", "aria-hidden": "true" }), tokens], { class: "graph-scroll" });
    const panel = make("aside", [], { class: "graph-panel", "aria-label": "The mark that is chosen" });
    const head = graphWords.head(graph);
    root.append(head, make("div", [prefix.row, nodes.row, edges.row, foldAll], { class: "graph-tools" }), count, legend(), keys, make("div", [scroll, panel], { class: "graph-body" }));

    function listen(change) {
      prefix.input.addEventListener("input", () => change({ prefix: prefixes[prefix.input.value] }));
      nodes.input.addEventListener("input", () => change({ nodes: Number(nodes.input.value) }));
      edges.input.addEventListener("input", () => change({ edges: Number(edges.input.value) }));
      foldAll.addEventListener("click", () => change({ open: new Set() }));
    }
    function fill(state, view) {
      prefix.input.value = prefixes.indexOf(state.prefix);
      prefix.output.textContent = `the first ${number(state.prefix)} features`;
      prefix.input.setAttribute("aria-valuetext", prefix.output.textContent);
      for (const [part, value] of [[nodes, state.nodes], [edges, state.edges]]) {
        part.input.value = value;
        part.output.textContent = `${percent(value)} of the influence`;
        part.input.setAttribute("aria-valuetext", part.output.textContent);
      }
      foldAll.disabled = !state.open.size;
      for (const row of head.querySelectorAll("[data-prefix]")) row.toggleAttribute("aria-current", Number(row.dataset.prefix) === state.prefix);
      for (const row of head.querySelectorAll("[aria-current]")) row.setAttribute("aria-current", "true");
      const stood = [...view.marks].reduce((sum, mark) => sum + mark.members.length, 0);
      count.textContent = `Shown: ${number(view.marks.size)} marks, which stand for ${number(stood)} of ${number(graph.nodes.length)} nodes, and ${number(view.edges.length)} of ${number(view.folded.edges.length)} edges between marks. `
        + `The graph had ${number(graph.all_edges)} edges before pruning; ${number(graph.read)} of ${number(graph.active)} active features have edges of their own.`;
    }
    return { root, scroll, rows, plot, tokens, panel, listen, fill };
  }

  function legend() {
    const sample = (mark, text) => make("li", [drawn("svg", { viewBox: "-9 -9 18 18", width: 18, height: 18, "aria-hidden": "true" }, shape(mark)), ` ${text}`]);
    const line = (kind, text) => make("li", [drawn("svg", { viewBox: "0 0 30 12", width: 30, height: 12, "aria-hidden": "true" }, drawn("path", { d: "M0 6H30", class: kind, "stroke-width": 3 })), ` ${text}`]);
    return make("ul", [
      sample({ kind: "feature", group: 0 }, "feature of the first dictionary"), sample({ kind: "feature", group: 1 }, "of a later one"),
      sample({ kind: "feature", group: 0, holds: 2 }, "with others folded in"), sample({ kind: "others" }, "other features of the layer"), sample({ kind: "error" }, "error"),
      sample({ kind: "embedding" }, "token"), sample({ kind: "logit" }, "next token"), line("plus", "raises"), line("minus", "lowers"),
    ], { class: "graph-legend", "aria-label": "Legend" });
  }

  // A mark's shape around 0, 0.
  function shape(mark) {
    switch (mark.kind) {
      case "error": return [drawn("path", { d: "M0 -6.5L6.5 0L0 6.5L-6.5 0Z" , class: "error" })];
      case "embedding": return [drawn("rect", { x: -5.5, y: -5.5, width: 11, height: 11, class: "embedding" })];
      case "logit": return [drawn("rect", { x: -8, y: -5.5, width: 16, height: 11, rx: 5.5, class: "logit" })];
      case "others": return [drawn("circle", { r: 6, class: "others" }), drawn("path", { d: "M-3 0h.01M0 0h.01M3 0h.01", class: "dots" })];
      case "group": return [drawn("rect", { x: -9, y: -7, width: 18, height: 14, rx: 4, class: "hand" }), drawn("path", { d: "M-4 -2H4M-4 2H4", class: "bars" })];
      default: {
        const circle = drawn("circle", { r: 5.5, class: `feature g${Math.min(2, mark.group ?? 2)}` });
        return mark.holds ? [drawn("circle", { r: 8.2, class: "ring" }), circle] : [circle];
      }
    }
  }

  function paint(page, graph, view, { picked, tokens, axis }) {
    const { placed, say } = view;
    for (const [svg, width, height] of [[page.plot, placed.width, placed.height], [page.rows, axis, placed.height], [page.tokens, placed.width, 30]]) {
      svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      svg.setAttribute("width", width);
      svg.setAttribute("height", height);
    }
    const bands = placed.rows.filter((row) => row.row % 2 === 1 && !row.empty);
    const band = (width) => bands.map((row) => drawn("rect", { x: 0, y: row.top, width, height: row.bottom - row.top, class: "band" }));
    page.rows.replaceChildren(...band(axis), ...placed.rows.filter((row) => !row.empty).map((row) => drawn("text", { x: axis - 8, y: row.top + 15, "text-anchor": "end" }, row.row === 0 ? "token" : row.row > graph.layers ? "next" : String(row.row - 1))));
    page.tokens.replaceChildren(...placed.columns.map((column, t) => drawn("text", { x: column.x + column.width / 2, y: 19, "text-anchor": "middle" }, [drawn("title", {}, `token ${t}: ${tokens[t]}`), graphLayout.shorten(tokens[t], column.width)])));
    const lines = placed.columns.slice(1).map((column) => drawn("path", { d: `M${column.x - 2} 0V${placed.height}`, class: "between" }));
    const most = Math.max(1e-12, ...view.edges.map(graphFold.strength));
    const edges = [...view.edges].reverse().map((edge) => {
      const part = Math.sqrt(graphFold.strength(edge) / most), [from, to] = [view.spots.get(edge.from.name), view.spots.get(edge.to.name)];
      return drawn("path", {
        d: graphLayout.path(from, to), class: edge.weight < 0 ? "minus" : "plus", "stroke-width": (0.8 + 5 * part).toFixed(2), "stroke-opacity": (0.18 + 0.62 * part).toFixed(2),
        "data-from": edge.from.name, "data-to": edge.to.name, "data-weight": edge.weight,
      }, drawn("title", {}, `${say.long(edge.from)} → ${say.long(edge.to)}: ${graphWords.signed(edge.weight)}`));
    });
    const marks = inOrder(view).map((spot) => {
      const { mark } = spot, held = mark.kind === "feature" ? say.hidden(mark) : 0;
      const group = mark.feature === null ? null : mark.own === null ? 0 : graph.nodes[mark.own].group;
      const chosen = view.chosen === mark;
      return drawn("g", {
        transform: `translate(${spot.x.toFixed(1)} ${spot.y})`, "data-name": mark.name, role: "button", tabindex: -1, "aria-label": say.long(mark),
        "aria-pressed": chosen || picked.has(mark.name), class: `mark${chosen ? " chosen" : ""}${picked.has(mark.name) ? " picked" : ""}${mark.own === null && mark.kind === "feature" ? " silent" : ""}`,
      }, [
        drawn("circle", { r: 11, class: "halo" }), ...shape({ kind: mark.kind, group, holds: held }),
        ...(spot.label ? [drawn("text", { y: spot.labelY, "text-anchor": "middle" }, spot.label)] : []),
      ]);
    });
    page.plot.replaceChildren(drawn("g", {}, [...band(placed.width), ...lines]), drawn("g", { class: "edges", "aria-hidden": "true" }, edges), drawn("g", { role: "presentation" }, marks), drawn("g", { class: "tip", "aria-hidden": "true" }));
  }

  // The whole name of a mark, above all else.
  function tip(plot, spot, view) {
    const place = plot.querySelector(".tip");
    if (!spot) return place.replaceChildren();
    const text = graphLayout.shorten(view.say.long(spot.mark), 420), width = Math.min(view.placed.width, graphLayout.widthOf(text) * 0.94 + 14);
    const x = Math.min(Math.max(0, spot.x - width / 2), view.placed.width - width), y = spot.y > 40 ? spot.y - 38 : spot.y + 12;
    place.replaceChildren(drawn("rect", { x, y, width, height: 22, rx: 4 }), drawn("text", { x: x + width / 2, y: y + 15, "text-anchor": "middle" }, text));
  }

  return { draw };
})();
