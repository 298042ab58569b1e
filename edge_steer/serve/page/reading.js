// How far each word lies toward a steering's ends: the words' colours, their mean, and the button that asks for it.

import { button } from "./dom.js";
import { save, state } from "./state.js";
import { signed } from "./steering.js";

// As shares of the way from the middle to a class's mean: nearer than PLAIN is neither end's colour; under a steering
// words lie far beyond the mean, so the colour is full at FULL.
const PLAIN = 1 / 3;
const FULL = 3;

/** Keep what a chunk read of the text that comes now. */
export function keepReadings(answer, readings) {
  if (readings) (answer.readings ??= []).push({ at: answer.text.length, values: readings });
}

/** Marks that colour an answer's words; null where the chosen steering was not read in it. */
export function readMarks(answer) {
  const read = readingsOf(answer);
  return read.length ? read.map(([each, value]) => ({ at: each.at, label: "", tone: toneOf(value), title: `${state.read} ${signed(value)}`, source: each })) : null;
}

/** The mean of an answer's readings, in words; "" where there are none. */
export function meanReading(answer) {
  const values = readingsOf(answer).map(([, value]) => value);
  return values.length ? `reads ${state.read} ${signed(values.reduce((sum, value) => sum + value, 0) / values.length)}` : "";
}

/** A button that colours words by this steering, in answers that follow; `onread` is called after each press. */
export function readButton({ name, readable }, onread) {
  if (!readable) return null;
  return button("Colour words", () => {
    state.read = state.read === name ? "" : name;
    for (const each of document.querySelectorAll("[data-read]")) each.setAttribute("aria-pressed", String(each.dataset.read === state.read));
    save();
    onread();
  }, { className: "link read-button", "aria-pressed": String(state.read === name), "data-read": name, "aria-label": `Colour words by ${name}`, title: "From the next answer on: each word in the colour of the end that it lies toward" });
}

const readingsOf = (answer) => (answer.readings ?? []).flatMap((each) => (state.read in each.values ? [[each, each.values[state.read]]] : []));

const toneOf = (value) => (Math.abs(value) < PLAIN ? 0 : Math.max(-1, Math.min(1, value / FULL)));
