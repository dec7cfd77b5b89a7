"use strict";
// An attribution graph made coarser: which mark stands for which nodes, and the sums of their edges. No document here.
const graphFold = (() => {
  // A node's name: it stays the same when the graph is made again, so that links last.
  function nameOf(node) {
    if (node.kind === "embedding") return `t.${node.token}`;
    if (node.kind === "logit") return `l.${node.token}.${node.token_id}`;
    if (node.kind === "error") return `e.${node.layer}.${node.token}`;
    if (node.kind === "others") return `x.${node.layer}.${node.token}`;
    return `${node.target ? "g" : "f"}.${node.layer}.${node.token}.${node.feature}`;
  }

  const known = new WeakMap();  // what of a graph is the same however it is folded

  const featureOf = (name) => (name.startsWith("f.") ? Number(name.split(".")[3]) : null);

  // Of each node its own name and those of what it may be folded into, the nearest first: its feature's ancestors, and in
  // the end, for what no feature of the smallest dictionary leads to, the layer's other features.
  function chainsOf(graph) {
    return graph.nodes.map((node) => {
      if (node.kind !== "feature" || node.target) return [nameOf(node)];
      const features = [node.feature, ...node.ancestors], chain = features.map((feature) => `f.${node.layer}.${node.token}.${feature}`);
      if (features.at(-1) >= graph.prefixes[0]) chain.push(`x.${node.layer}.${node.token}`);
      return chain;
    });
  }

  // The name of what a node is shown as: itself in the prefix or where what it folds into is unfolded, else that.
  function shownAs(chain, prefix, open) {
    let shown = chain.at(-1);
    for (let i = chain.length - 2; i >= 0; i--) {
      const feature = featureOf(chain[i]);
      if (feature !== null && feature >= prefix && !open.has(chain[i + 1])) break;
      shown = chain[i];
    }
    return shown;
  }

  // Marks by name, and the sums of edges between them. `groups` are those made by hand, { name, names }: a node belongs
  // to the first that has its name, or the name of something it may be folded into.
  function fold(graph, { prefix, open = new Set(), groups = [] }) {
    if (!known.has(graph)) known.set(graph, { chains: chainsOf(graph), reads: incomingOf(graph) });
    const { chains, reads } = known.get(graph), marks = new Map();
    if (prefix >= Math.max(...graph.prefixes)) prefix = Infinity;  // some layers may have more than all share
    const named = new Map();
    groups.forEach((group, n) => group.names.forEach((name) => { if (!named.has(name)) named.set(name, n); }));
    const markOf = graph.nodes.map((node, i) => {
      const owner = chains[i].find((name) => named.has(name));
      const name = owner === undefined ? shownAs(chains[i], prefix, open) : `h.${named.get(owner)}`;
      let mark = marks.get(name);
      if (!mark) {
        const [kind, layer, token, feature] = name.split(".");
        mark = { name, kind: kindOf(kind), layer: node.layer, token: node.token, feature: null, own: null, members: [], influence: 0, incoming: 0, target: false };
        if (kind === "f" || kind === "g") mark.feature = Number(feature);
        if (kind === "h") mark.title = groups[named.get(owner)].name;
        marks.set(name, mark);
      }
      if (name === chains[i][0]) mark.own = i;
      mark.members.push(i);
      mark.influence += node.influence;
      mark.incoming += reads[i];
      mark.target ||= node.target;
      // A group by hand stands where its strongest node does.
      if (!mark.strongest || node.influence > mark.strongest.influence) [mark.strongest, mark.layer, mark.token] = [node, node.layer, node.token];
      return mark;
    });
    const sums = new Map(), edges = [];  // by what is read, then by what reads
    for (const [source, target, weight] of graph.edges) {
      const from = markOf[source], to = markOf[target];
      if (from === to) continue;
      let readers = sums.get(from), edge = readers?.get(to);
      if (!readers) sums.set(from, (readers = new Map()));
      if (!edge) {
        readers.set(to, (edge = { from, to, weight: 0 }));
        edges.push(edge);
      }
      edge.weight += Number(weight);
    }
    // How much of the targets' influence goes through an edge.
    for (const edge of edges) edge.strength = edge.to.incoming > 0 ? (Math.abs(edge.weight) / edge.to.incoming) * edge.to.influence : 0;
    edges.sort((a, b) => b.strength - a.strength);
    return { marks, edges, chains };
  }

  // What each node reads in all, taken absolutely, of which pruning may have left a part.
  function incomingOf(graph) {
    const sums = graph.nodes.map((node) => Number(node.incoming ?? 0)), known = sums.map((sum) => sum > 0);
    for (const [, target, weight] of graph.edges) if (!known[target]) sums[target] += Math.abs(weight);
    return sums;
  }

  const kindOf = (letter) => ({ t: "embedding", l: "logit", e: "error", f: "feature", g: "feature", x: "others", h: "group" })[letter];

  // The fewest things that hold a share of all they weigh, of those that are sorted, the heaviest first.
  function heaviest(sorted, weigh, share) {
    if (share >= 1) return sorted;
    const wanted = share * sorted.reduce((sum, thing) => sum + weigh(thing), 0) * (1 - 1e-9), kept = [];
    let sum = 0;
    for (const thing of sorted) {
      if (sum >= wanted) break;
      sum += weigh(thing);
      kept.push(thing);
    }
    return kept;
  }

  const strength = (edge) => edge.strength;

  // The marks that hold a share of the influence, and among them the edges that do; targets, groups by hand and
  // `always` stay.
  function prune(folded, nodeShare, edgeShare, always = new Set()) {
    const stays = (mark) => mark.target || mark.kind === "group" || always.has(mark.name);
    const marks = new Set([...folded.marks.values()].filter(stays));
    const rest = [...folded.marks.values()].filter((mark) => !stays(mark)).sort((a, b) => b.influence - a.influence);
    for (const mark of heaviest(rest, (m) => m.influence, nodeShare)) marks.add(mark);
    const among = folded.edges.filter((edge) => marks.has(edge.from) && marks.has(edge.to));
    return { marks, edges: heaviest(among, strength, edgeShare) };
  }

  // The largest share, of some steps, at which no more than so many things are left.
  function shareFor(things, weigh, most, steps) {
    const weights = things.map(weigh).sort((a, b) => b - a);
    if (weights.length <= most) return steps.at(-1);
    const sum = (some) => some.reduce((total, weight) => total + weight, 0);
    const held = sum(weights.slice(0, most)) / (sum(weights) || 1);
    return [...steps].reverse().find((share) => share <= held) ?? steps[0];
  }

  return { fold, prune, strength, shareFor, nameOf };
})();
