// The link to what is shown, in the part of the address behind the #, which no request has.
const LONGEST = 20000;  // characters of a text in a link

// The fragment of a state; of none if its text is too long for a link.
export function write({ text, prefix, token, feature }) {
  if (!text || text.length > LONGEST) return "";
  const found = new URLSearchParams({ text, prefix });
  if (token !== null) found.set("token", token);
  if (feature !== null) found.set("feature", feature);
  return "#" + found;
}

// What a fragment says, null where it says nothing, and what of it does not fit; null if it is no link of this page.
export function read(fragment, prefixes, numFeatures) {
  const found = new URLSearchParams(fragment.slice(1)), problems = [];
  if (fragment.length > 1 && !["text", "prefix", "token", "feature"].some((name) => found.has(name))) return null;
  const whole = (name, below) => {
    const given = found.get(name);
    if (given === null) return null;
    if (/^\d{1,10}$/.test(given) && Number(given) < below) return Number(given);
    problems.push(`${name} must be a whole number ${below === Infinity ? "" : `below ${below} `}and is ${JSON.stringify(given.slice(0, 40))}`);
    return null;
  };
  const state = { text: found.get("text") || null, token: whole("token", Infinity), feature: whole("feature", numFeatures), prefix: whole("prefix", Infinity) };
  if (state.prefix !== null && !prefixes.includes(state.prefix)) {
    problems.push(`prefix must be one of ${prefixes.join(", ")} and is ${state.prefix}`);
    state.prefix = null;
  }
  return { ...state, problem: problems.length ? `Of this link, ${problems.join("; ")}.` : null };
}

// Puts a link into the clipboard, or where browsers have none for this address, into a field to copy it from. Returns
// what to tell of it.
export async function copy(link, field) {
  field.hidden = true;
  try {
    await navigator.clipboard.writeText(link);
    return "The link is copied.";
  } catch {
    field.hidden = false;
    field.value = link;
    field.select();
    return "This browser copies nothing from here by itself: the link is selected.";
  }
}

export const tooLong = (text) => (text.length > LONGEST ? `This text has ${text.length} characters; a link holds ${LONGEST}.` : null);
