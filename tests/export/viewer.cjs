// circuit-tracer's own viewer code, as far as it loads features: node viewer.cjs ASSETS FEATURES NUMBER...
// What it fetches from the hub comes from the directory FEATURES; prints the features as one JSON array.
const fs = require("fs"), path = require("path"), vm = require("vm"), zlib = require("zlib");
const [assets, features, ...numbers] = process.argv.slice(2);
const HUB = "https://huggingface.co/OWNER/NAME/resolve/main/features/";

async function fetched(url, { method = "GET", headers = {} } = {}) {
  const file = path.join(features, path.basename(url));
  if (!url.startsWith(HUB) || !fs.existsSync(file)) return { ok: false, status: 404 };
  let bytes = method === "HEAD" ? Buffer.alloc(0) : fs.readFileSync(file);
  const range = /^bytes=(\d+)-(\d+)$/.exec(headers.Range ?? "");
  if (range) bytes = bytes.subarray(+range[1], +range[2] + 1);
  return { ok: true, status: range ? 206 : 200, arrayBuffer: async () => Uint8Array.from(bytes).buffer };
}

// Anything may be called on it or read of it, and gives it again: what only draws.
const drawing = new Proxy(() => {}, { get: () => drawing, apply: () => drawing });
const pako = { inflate: (bytes) => zlib.gunzipSync(Buffer.from(bytes)).toString() };
const location = { hostname: "localhost", search: "", href: HUB };
const window = { d3: drawing, location, initFeatureExamplesLogits() {}, initFeatureExamplesList() {} };
const scope = { window, location, d3: drawing, pako, fetch: fetched, console, URL, URLSearchParams, setTimeout };
vm.createContext(scope);
for (const name of ["util.js", "feature_examples/init-feature-examples.js"]) {
  vm.runInContext(fs.readFileSync(path.join(assets, name), "utf8"), scope);
  scope.util = window.util;
}
const viewer = window.initFeatureExamples({ containerSel: drawing });
Promise.all(numbers.map((n) => viewer.loadFeature("OWNER/NAME", +n))).then((found) => {
  console.log(JSON.stringify(found.map(({ colorScale, ...rest }) => rest)));
});
