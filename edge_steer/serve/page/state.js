// What the page remembers: conversation, dials, settings. One tab, one conversation: it survives a reload.

import { firstDial } from "./steering.js";

const STORE = "edge-steer.conversation";
const EMPTY = { model: "", steerings: [], dials: {}, compare: false, read: "", system: "", sampling: { max_tokens: "512" }, turns: [] };

export const state = load();

function load() {
  try {
    const stored = { ...structuredClone(EMPTY), ...JSON.parse(sessionStorage.getItem(STORE) ?? "{}") };
    for (const answer of stored.turns.flatMap((turn) => turn.versions.flat())) {
      if (answer.status === "waiting" || answer.status === "talking") {
        answer.status = "failed";
        answer.problem = "The page was reloaded while this was being said.";
      }
    }
    return stored;
  } catch {
    return structuredClone(EMPTY); // stored by another version of the page
  }
}

let timer = 0;

/** Store soon; many changes in a row are one write. */
export function save() {
  timer ||= setTimeout(saveNow, 300);
}

export function saveNow() {
  clearTimeout(timer);
  timer = 0;
  try {
    sessionStorage.setItem(STORE, JSON.stringify(state));
  } catch {
    // The store is full or forbidden: the conversation goes on, it does not survive a reload.
  }
}

/** Take over what the server has loaded; dials of steerings that are still there stay where they are. */
export function setSteerings({ model, steerings }) {
  state.model = model;
  state.steerings = steerings;
  if (!steerings.some(({ name, readable }) => readable && name === state.read)) state.read = "";
  state.dials = Object.fromEntries(steerings.map((each) => [each.name, state.dials[each.name] ?? firstDial(each)]));
  save();
}

export const steeringOf = (name) => state.steerings.find((each) => each.name === name);

/** The dials as a request names them: all of them, null for off. */
export const dialsNow = () =>
  Object.fromEntries(state.steerings.map(({ name }) => [name, state.dials[name].on ? state.dials[name].value : null]));

export const dialsOff = () => Object.fromEntries(state.steerings.map(({ name }) => [name, null]));

/** The sampling fields that hold a number. */
export const samplingNow = () =>
  Object.fromEntries(Object.entries(state.sampling).filter(([, text]) => text !== "").map(([name, text]) => [name, Number(text)]));

export const versionOf = (turn) => turn.versions[turn.version];

/** The answer with which the conversation goes on. */
export const chosenOf = (turn) => versionOf(turn)[Math.min(turn.chosen, versionOf(turn).length - 1)];

/** What was said before `turn`, and its prompt, in OpenAI's form. */
export function messagesFor(turn) {
  return [...saidBefore(state.turns.indexOf(turn)), { role: "user", content: turn.prompt }];
}

/** The first `count` turns; one that got no answer is left out, since templates want questions and answers in turn. */
function saidBefore(count) {
  const system = state.system.trim() ? [{ role: "system", content: state.system }] : [];
  const said = state.turns.slice(0, count).filter((turn) => chosenOf(turn).text);
  return [...system, ...said.flatMap((turn) => [{ role: "user", content: turn.prompt }, { role: "assistant", content: chosenOf(turn).text }])];
}

/** The same messages without the oldest question and its answer; null where there is none to leave out. */
export function withoutOldest(messages) {
  const first = messages.findIndex(({ role }) => role === "user");
  return messages.length > first + 2 ? messages.toSpliced(first, 2) : null;
}

/** Everything that is needed to say it again: texts, dials and where they moved, seeds, sampling. */
export function exported() {
  const turns = state.turns.map((turn) => ({
    prompt: turn.prompt,
    continued_with: { version: turn.version, answer: turn.chosen },
    versions: turn.versions.map((answers) => answers.map(({ now, status, ...kept }) => ({ ...kept, status }))),
  }));
  return {
    format: "edge-steer conversation", version: 1, date: new Date().toISOString(), model: state.model,
    steerings: state.steerings, dials: dialsNow(), system: state.system, sampling: samplingNow(),
    messages: saidBefore(state.turns.length), turns,
  };
}
