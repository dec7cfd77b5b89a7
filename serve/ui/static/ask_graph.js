// Asks for a prompt's attribution graph, waits for it, and draws it. What was typed stands behind the address's #, which
// no request has, and in the bodies of POST /graph and POST /steer.
import { call, json } from "./call.js";

const { make, spaced, number, percent } = graphWords;
const element = (id) => document.getElementById(id);
const ask = element("ask");
const PAUSE = 400, MOST_CHANGES = 64, SHOWN = 8;
const FIELDS = { prompt: "prompt", target: "targets", size: "size", most: "most", nodeshare: "node-share", edgeshare: "edge-share" };

let working = new AbortController(), job = null, drawing = null;

const say = (problem) => {
  element("problem").hidden = !problem;
  element("problem").textContent = problem ?? "";
};
const tell = (text) => { element("status").textContent = text; };

// What the fields say, as POST /graph takes it.
function asked() {
  const filled = (id) => (element(id).value === "" ? undefined : Number(element(id).value));
  const targets = element("targets").value.split("\n").filter((line) => line !== "");
  return {
    prompt: element("prompt").value, model: ask.dataset.model, targets: targets.length ? targets : undefined, prefix: filled("size"),
    max_features: filled("most"), node_share: filled("node-share"), edge_share: filled("edge-share"), faithfulness: element("faithful").checked,
  };
}

// The fields and the job in the link; what the graph itself has there belongs to the graph that was.
function remember(id) {
  const found = new URLSearchParams();
  for (const [name, field] of Object.entries(FIELDS)) if (element(field).value !== (element(field).defaultValue ?? "")) found.set(name, element(field).value);
  if (element("faithful").checked) found.set("faithful", 1);
  if (id) found.set("job", id);
  history.replaceState(history.state, "", "#" + found);
}

function busy(on) {
  element("go").disabled = on;
  element("waiting").hidden = !on;
}

// Progress until there is a result, which is drawn.
async function follow(id, signal) {
  for (;;) {
    const found = await (await call(`/graph/${id}`, {}, signal, tell)).json();
    const bar = element("progress");
    if (found.of) [bar.max, bar.value] = [found.of, found.done];
    else bar.removeAttribute("value");
    if (found.state === "failed") throw new Error(found.error);
    if (found.state === "done") break;
    const told = {
      queued: found.ahead ? `Waiting: ${number(found.ahead)} graph${found.ahead === 1 ? "" : "s"} come first` : "Waiting",
      loading: `Loading run ${found.run_id}`,
      running: !found.of ? "Tracing the prompt" : found.done < found.of ? `Edges into ${number(found.done)} of ${number(found.of)} features` : "Influence, pruning and scores",
    }[found.state];
    if (!told) throw new Error(`The service answered with a job that is ${found.state}.`);
    tell(told + " …");
    await new Promise((done) => setTimeout(done, PAUSE));
  }
  tell("Drawing …");
  const graph = await (await call(`/graph/${id}/result?format=graph`, {}, signal, tell)).json();
  tell("");
  show(graph, id);
}

function show(graph, id) {
  drawing?.destroy();
  element("result").hidden = false;
  for (const link of element("forms").querySelectorAll("a")) link.href = `/graph/${id}/result?format=${link.dataset.form}`;
  const measured = graph.faithfulness, place = element("measured");
  place.hidden = !measured;
  if (measured) place.textContent = measured.features
    ? `Of the ${number(measured.features)} strongest features, taken out of the model one at a time: ${measured.spearman === null ? "" : `rank correlation of what the graph foretells with what happens ${number(measured.spearman)}; `}the same sign for ${percent(measured.same_sign)}.`
    : "The graph has no feature that could be taken out of the model.";
  drawing = mtcGraph.draw(graph, {
    container: element("graph"), featureUrl: "/ui/feature/{feature}?model={run}&layer={layer}", ablate: (nodes) => ablate(graph, nodes),
  });
}

// The next token without these features, as the real model gives it.
async function ablate(graph, nodes) {
  const features = nodes.filter((node) => node.kind === "feature");
  if (!features.length) return "Only features can be taken out of the model.";
  const chosen = [...features].sort((a, b) => b.influence - a.influence).slice(0, MOST_CHANGES);
  const interventions = chosen.map((node) => ({ layer: node.layer, feature: node.feature, value: 0, positions: [node.token] }));
  const options = json({ input_ids: graph.token_ids, model: graph.run_id, interventions, max_tokens: 1 });
  const answer = await (await call("/steer", { ...options, headers: { ...options.headers, Accept: "application/json" } }, undefined, () => {})).json();
  // What the graph explains comes first, then what changed most.
  const explained = new Set(graph.nodes.filter((node) => node.kind === "logit").map((node) => node.token_id));
  const wanted = answer.next.filter((each) => explained.has(each.token_id)).sort((a, b) => b.plain - a.plain);
  const others = answer.next.filter((each) => !explained.has(each.token_id));
  const rows = [...wanted, ...others].slice(0, Math.max(SHOWN, wanted.length)).map((each) => make("tr", [
    make("th", make("span", spaced(each.text), { class: "token" }), { scope: "row" }),
    ...[each.plain, each.steered].map((value) => make("td", percent(Math.exp(value)), { class: "n" })),
    make("td", `${each.steered >= each.plain ? "+" : "−"}${number(Math.abs(each.steered - each.plain))}`, { class: "n" }),
  ]));
  const title = chosen.length === 1 ? "Without this feature at its token" : `Without ${chosen.length < features.length ? `the ${number(chosen.length)} strongest` : "these"} features at their tokens`;
  const heads = ["Next token", "before", "after", "log ratio"].map((text, n) => make("th", text, { scope: "col", ...(n ? { class: "n" } : {}) }));
  return make("table", [make("caption", title), make("thead", make("tr", heads)), make("tbody", rows)], { class: "ablated" });
}

// Work that whoever starts anew, or cancels, no longer wants.
async function run(work) {
  working.abort();
  const mine = (working = new AbortController());
  say(null);
  busy(true);
  try {
    await work(mine.signal);
  } catch (error) {
    if (mine !== working || error.name === "AbortError") return;
    tell("");
    say(error.message);
    return error;
  } finally {
    if (mine === working) busy(false);
  }
}

const drop = (id) => { fetch(`/graph/${id}`, { method: "DELETE", keepalive: true }).catch(() => {}); };  // it may be gone

function forget() {
  if (job) drop(job);
  job = null;
}

ask.addEventListener("submit", (event) => {
  event.preventDefault();
  forget();
  run(async (signal) => {
    tell("Asking …");
    remember(null);
    const { id } = await (await call("/graph", json(asked()), undefined, tell)).json();  // answered even if cancelled
    job = signal.aborted ? job : id;
    if (signal.aborted) return drop(id);
    remember(id);
    await follow(id, signal);
    if (job === id) job = null;  // it is kept, for the link
  });
});

element("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask.requestSubmit();
});
element("cancel").addEventListener("click", () => {
  working.abort();
  forget();
  remember(null);
  busy(false);
  tell("Cancelled.");
  element("go").focus();
});

// A link that was kept: its fields, and its graph if the service still has it.
const kept = new URLSearchParams(location.hash.slice(1));
for (const [name, field] of Object.entries(FIELDS)) if (kept.has(name)) element(field).value = kept.get(name);
element("faithful").checked = kept.has("faithful");
busy(false);
if (/^[\w-]+$/.test(kept.get("job") ?? "")) {  // whoever made the link decides what it holds
  const id = (job = kept.get("job"));
  run(async (signal) => {
    try {
      await follow(id, signal);
      if (job === id) job = null;
    } catch (error) {
      if (error.kind !== "unknown_job") throw error;
      tell("The graph of this link is not kept any more; draw it again.");
    }
  });
}
