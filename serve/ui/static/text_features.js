// What is known of a text's features, and which of them come first.
import { call } from "./call.js";

export const DENSE = 0.1;  // share of the analysed tokens, above which a feature fires on nearly everything
const MOST = 500;          // features that one GET /features may name

// The rows of GET /features of those that were asked for; a run without an analysis has none.
export class Facts {
  #rows = new Map();

  constructor(own) {
    this.own = own;  // parameters: which run and layer
  }

  of(feature) {
    return this.#rows.get(feature) ?? null;
  }

  async learn(features, signal, tell) {
    const missing = features.filter((f) => !this.#rows.has(f)), parts = [];
    for (let i = 0; i < missing.length; i += MOST) parts.push(missing.slice(i, i + MOST));
    try {
      await Promise.all(parts.map(async (part) => {
        const wanted = new URLSearchParams([...this.own, ["limit", part.length], ...part.map((f) => ["feature", f])]);
        const answer = await (await call("/features?" + wanted, {}, signal, tell)).json();
        for (const row of answer.features) this.#rows.set(row.feature, row);
      }));
    } catch (error) {
      if (error.name === "AbortError") throw error;  // else it is asked again with the next text
    }
  }

  massive(feature) {
    return this.of(feature)?.massive ?? false;
  }

  dense(feature) {
    return (this.of(feature)?.density ?? 0) > DENSE;
  }

  // Of the strongest activation in the analysed text; null where there was none.
  share(feature, value) {
    const most = this.of(feature)?.max_activation ?? 0;
    return most > 0 ? value / most : null;
  }
}

// A token's features, strongest first; those of massive tokens, whose activations say nothing beside others', last.
export function entries(answer, t, facts) {
  const { indptr, indices, values } = answer.csr, found = [];
  for (let i = indptr[t]; i < indptr[t + 1]; i++) {
    found.push({ feature: indices[i], value: values[i], share: facts.share(indices[i], values[i]) });
  }
  return found.sort((a, b) => facts.massive(a.feature) - facts.massive(b.feature) || b.value - a.value || a.feature - b.feature);
}

// A text's features with their strongest activation: first those nearest to their own maximum, last those without one.
export function ranked(answer, facts) {
  const found = new Map();
  const { indices, values } = answer.csr;
  indices.forEach((feature, i) => {
    const row = found.get(feature) ?? { feature, value: 0, tokens: 0 };
    row.tokens++;
    row.value = Math.max(row.value, values[i]);
    found.set(feature, row);
  });
  for (const row of found.values()) row.share = facts.share(row.feature, row.value);
  return [...found.values()].sort((a, b) => (b.share ?? -1) - (a.share ?? -1) || b.value - a.value || a.feature - b.feature);
}

// Ranked features in what is listed, each with its copies, and what is put aside: dense ones unless they are wanted, and
// those of massive tokens.
export function fold(rows, facts, withDense) {
  const massive = rows.filter((row) => facts.massive(row.feature));
  const dense = rows.filter((row) => facts.dense(row.feature) && !facts.massive(row.feature));
  const kept = rows.filter((row) => !facts.massive(row.feature) && (withDense || !facts.dense(row.feature)));
  const heads = new Map(kept.map((row) => [row.feature, { ...row, copies: [] }]));
  for (const row of kept) {
    const head = heads.get(facts.of(row.feature)?.copy_of);
    if (!head) continue;
    head.copies.push(row);
    heads.delete(row.feature);
  }
  return { listed: [...heads.values()], dense, massive };
}

// Those that a prefix adds on a token: the ones that refine another active feature under that one, and the others.
// Features below `from` are of the smaller prefixes.
export function added(answer, t, from, facts) {
  const active = entries(answer, t, facts), on = new Set(active.map((entry) => entry.feature));
  const refining = new Map(), others = [];
  for (const entry of active) {
    if (entry.feature < from) continue;
    const parent = facts.of(entry.feature)?.parent ?? null;
    if (parent === null || !on.has(parent)) others.push(entry);
    else refining.set(parent, [...(refining.get(parent) ?? []), entry]);
  }
  return { refining: [...refining].map(([parent, children]) => ({ parent, children })), others };
}
