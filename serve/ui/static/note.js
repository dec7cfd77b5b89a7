// The star and the note on a feature's page.
import { call, json } from "./call.js";
import { keep, ownNotes, shown } from "./notes.js";
import { element, visible } from "./words.js";

const form = element("note"), { key, feature, link } = form.dataset;
let kept = form.dataset.kept !== undefined;
let now = { note: element("note-text").value || null, star: element("star").getAttribute("aria-pressed") === "true",
  note_changed: form.dataset.changed || null };

// The note that the field's words come from: saving them is refused if it is another one by then.
let seen = now;
const written = () => element("note-text").value.trim() || null;

// What the service keeps after a change. A star brings a note that somebody else wrote meanwhile: it is shown where that
// costs no words, and not taken for seen where it does.
function take(answer, part) {
  const words = answer.note !== seen.note && !("note" in part)
    ? ` Someone else changed the note to “${visible(answer.note ?? "")}”.` : "";
  if (words && written() === seen.note) element("note-text").value = answer.note ?? "";
  if (!words || written() === answer.note) seen = answer;
  now = answer;
  return words;
}

function draw() {
  element("star").setAttribute("aria-pressed", now.star);
  element("noted").replaceChildren(...shown(now, "span"));
}

// Whether it is kept now, wherever that is.
async function change(part) {
  const tell = (words) => { element("note-told").textContent = words; };
  let why = "the service keeps none.";
  if (kept) {
    try {
      tell("Saving …");
      const words = take(await (await call(link, json(part, "PUT"), undefined, tell)).json(), part);
      tell(`Kept beside the run.${words}`);
      return draw();
    } catch (error) {
      if (error.kind === "note_changed") {
        now = seen = error.detail;
        draw();
        return tell(`Someone else changed it to “${visible(now.note ?? "")}”. Save again to replace that.`);
      }
      if (!["no_notes", "read_only"].includes(error.kind)) return tell(error.message);
      kept = false;
      why = error.message + ".";
    }
  }
  now = { ...now, ...part };
  draw();
  try {
    keep(key, feature, now);
    tell(`Kept in this browser only: ${why}`);
  } catch {
    tell("Not kept: neither the service nor this browser keeps notes.");
  }
}

if (!kept) {
  now = { ...now, ...ownNotes(key)[feature] };
  element("note-text").value = now.note ?? "";
  element("note-told").textContent = "Stays in this browser: the service keeps no notes.";
  draw();
}
form.hidden = false;
element("star").addEventListener("click", () => change({ star: !now.star }));
form.addEventListener("submit", (event) => {
  event.preventDefault();
  change({ note: written(), seen: seen.note_changed });
});
