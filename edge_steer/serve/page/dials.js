// The panel of dials: a card for each steering, with a switch, a number, and a slider whose safe range is shaded.

import { $, button, h } from "./dom.js";
import { setTone } from "./markdown.js";
import { readButton } from "./reading.js";
import { save, state } from "./state.js";
import { beyond, firstDial, isSwitch, most, reach, shown, spokenValue, step, tone } from "./steering.js";

const STICKY = 0.025; // of the reach: a thumb dragged this near to 0 stays at 0

/** Show a card for each steering; `onmove` is called after every move, `onread` after words are coloured otherwise. */
export function showDials(onmove, onread) {
  const cards = state.steerings.map((steering, index) => card(steering, index, onmove, onread));
  const empty = h("p", { className: "hint" }, "No steering is loaded. Start the server with one: ", h("code", {}, "edge-steer serve -m MODEL -s happy.gguf"));
  $("dials").replaceChildren(...(cards.length ? cards : [empty]));
  $("all-off").hidden = !cards.length;
  $("all-off").onclick = () => {
    for (const dial of Object.values(state.dials)) dial.on = false;
    showDials(onmove, onread);
    onmove();
  };
  showSummary();
}

/** The dials in a few words, on the drawer's button, and as the needle in the page's head. */
export function showSummary() {
  const values = Object.fromEntries(state.steerings.map(({ name }) => [name, state.dials[name].on ? state.dials[name].value : null]));
  $("summary").textContent = state.steerings.map((each) => `${each.name} ${shown(each, values[each.name])}`).join(" · ");
  const now = tone(state.steerings, values);
  $("needle").style.transform = `rotate(${now * 62}deg)`;
  setTone($("needle"), now);
}

function card(steering, index, onmove, onread) {
  const dial = state.dials[steering.name];
  const id = `dial-${index}`;
  const toggle = h("input", { type: "checkbox", role: "switch", id: `${id}-on`, "aria-label": `${steering.name}, on` });
  const warning = h("p", { className: "warning", role: "status" });
  const scale = isSwitch(steering) ? null : scaleOf(steering, id);
  const root = h("section", { className: "card", "aria-labelledby": `${id}-name` },
    h("div", { className: "head" },
      h("h3", { id: `${id}-name` }, steering.name),
      scale?.number,
      h("label", { className: "switch" }, toggle, h("span", { "aria-hidden": "true" }))),
    steering.description ? h("p", { className: "description" }, steering.description) : null,
    scale?.parts, readButton(steering, onread), warning);

  const paint = () => {
    const value = dial.on ? dial.value : null;
    toggle.checked = dial.on;
    root.classList.toggle("off", !dial.on);
    warning.textContent = beyond(steering, value) ? "Beyond the safe range: the text may fall apart." : "";
    root.classList.toggle("beyond", beyond(steering, value));
    setTone(root, tone([steering], { [steering.name]: value }));
    scale?.paint(dial);
  };
  const move = (change) => {
    Object.assign(dial, change);
    paint();
    showSummary();
    save();
    onmove();
  };
  toggle.onchange = () => move({ on: toggle.checked });
  scale?.connect(dial, move);
  paint();
  return root;
}

/** Slider, number and ends of one steering. */
function scaleOf(steering, id) {
  const range = h("input", { type: "range", id: `${id}-range`, "aria-label": `${steering.name}, ${endsOf(steering)}` });
  const input = h("input", { type: "number", id: `${id}-number`, step: "any", min: -most(steering), max: most(steering), "aria-label": `${steering.name}, number` });
  const unit = h("span", { className: "unit", "aria-hidden": "true" }, steering.unit === "degrees" ? "°" : "");
  const track = h("div", { className: "track" }, h("div", { className: "rail" },
    h("div", { className: "safe" }), h("div", { className: "fill" }), h("div", { className: "over" }), h("div", { className: "zero" }),
    tick(steering, steering.min, "from"), tick(steering, steering.max, "to")), range);
  const low = endButton(steering, steering.negative_name || "less", steering.min);
  const high = endButton(steering, steering.positive_name || "more", steering.max);
  const reset = button("", null, { className: "link reset" });
  const parts = [track, h("div", { className: "ends" }, low, high), h("div", { className: "range" }, h("span", {}, rangeText(steering)), reset)];
  track.classList.toggle("provisional", steering.provisional);
  let far = 0;

  const paint = (dial) => {
    far = Math.max(far, reach(steering, dial.value));
    const place = (value) => `${(100 * (value + far)) / (2 * far)}%`;
    Object.assign(range, { min: -far, max: far, step: step(far), value: dial.value });
    range.setAttribute("aria-valuetext", spokenValue(steering, dial.on ? dial.value : null));
    if (document.activeElement !== input) {
      input.value = Number(dial.value.toFixed(2));
      input.setAttribute("aria-invalid", "false");
    }
    const known = steering.min !== null || steering.max !== null;
    const style = { "--from": place(steering.min ?? (known ? -far : 0)), "--to": place(steering.max ?? (known ? far : 0)), "--at": place(dial.value) };
    for (const [name, value] of Object.entries(style)) track.style.setProperty(name, value);
    track.classList.toggle("crowded", (steering.max ?? far) - (steering.min ?? -far) < 0.5 * far); // its numbers would overlap
    const first = firstDial(steering).value;
    reset.textContent = `Reset to ${shown(steering, first)}`;
    reset.hidden = Math.abs(first - dial.value) < 1e-9;
  };
  const connect = (dial, move) => {
    let dragged = false;
    range.onpointerdown = () => { dragged = true; };
    range.onkeydown = () => { dragged = false; };
    range.oninput = () => {
      const value = Number(range.value);
      move({ on: true, value: dragged && Math.abs(value) < STICKY * far ? 0 : Number(value.toFixed(4)) });
    };
    input.oninput = () => {
      const valid = input.value !== "" && input.validity.valid;
      input.setAttribute("aria-invalid", String(!valid));
      if (valid) move({ on: true, value: Number(input.value) });
    };
    input.onblur = () => paint(dial);
    low.onclick = () => move({ on: true, value: steering.min });
    high.onclick = () => move({ on: true, value: steering.max });
    reset.onclick = () => {
      far = 0;
      move({ on: true, value: firstDial(steering).value });
      range.focus();
    };
  };
  return { number: h("div", { className: "number" }, input, unit), parts, paint, connect };
}

const endsOf = ({ negative_name, positive_name }) => `${negative_name || "less"} to ${positive_name || "more"}`;

const tick = (steering, end, side) => (end === null ? null : h("small", { className: `tick ${side}`, "aria-hidden": "true" }, shown(steering, end)));

function endButton(steering, name, end) {
  const title = end === null ? null : `Turn to ${shown(steering, end)}, this end of the safe range`;
  return h("button", { type: "button", className: "end", disabled: end === null, title }, name);
}

function rangeText({ min, max, provisional }) {
  if (min === null && max === null) return "No safe range was measured";
  return provisional ? "Provisional range, not swept yet" : "Safe range, measured";
}
