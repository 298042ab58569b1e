// The conversation as it is seen: prompts, answers with their dials, and what can be done with each.

import { $, announce, button, h, notice } from "./dom.js";
import { renderMarkdown, setTone } from "./markdown.js";
import { meanReading, readMarks } from "./reading.js";
import { save, state, steeringOf, versionOf } from "./state.js";
import { shown, tone } from "./steering.js";

const CLOSE = 16; // characters: of moves nearer to each other than this only the last gets a chip

const views = new Map(); // answer → function that shows it as it is now
const waiting = new Set(); // answers to be shown in the next frame
const announced = new WeakMap(); // answer → how much of it was said aloud

/** Show all turns; `act` has {regenerate, show}. */
export function showTurns(act) {
  views.clear();
  $("welcome").hidden = state.turns.length > 0;
  $("turns").replaceChildren(...state.turns.map((turn, index) => turnOf(turn, index, act)));
}

/** Show what has changed of `answer`, with the next frame. */
export function showAnswer(answer) {
  if (!waiting.size) requestAnimationFrame(showWaiting);
  waiting.add(answer);
  speak(answer);
}

function showWaiting() {
  const box = $("scroll");
  const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 80; // else somebody reads further up
  waiting.forEach((answer) => views.get(answer)?.());
  waiting.clear();
  if (atEnd) box.scrollTop = box.scrollHeight;
}

export function scrollToEnd() {
  $("scroll").scrollTop = $("scroll").scrollHeight;
}

/** Say aloud each sentence once it is whole; of two answers at once only that they are there. */
function speak(answer) {
  const over = answer.status !== "waiting" && answer.status !== "talking";
  const from = announced.get(answer) ?? 0;
  const pair = state.turns.some((turn) => versionOf(turn).length > 1 && versionOf(turn).includes(answer));
  if (pair && !over) return;
  const rest = answer.text.slice(from);
  const whole = over ? rest : rest.match(/^[\s\S]*[.!?…:](?=\s)|^[\s\S]*\n/)?.[0] ?? "";
  if (whole.trim()) announce(pair ? `${answer.kind}: ${whole}` : whole);
  announced.set(answer, from + whole.length);
}

function turnOf(turn, index, act) {
  const answers = versionOf(turn);
  const last = index === state.turns.length - 1;
  return h("section", { className: "turn", "aria-label": `Turn ${index + 1}` },
    h("div", { className: "asked" }, h("span", { className: "hidden" }, "You: "), h("p", {}, turn.prompt)),
    h("div", { className: answers.length > 1 ? "answers pair" : "answers" },
      answers.map((answer, side) => answerOf(turn, answer, side, last, act))));
}

function answerOf(turn, answer, side, last, act) {
  const pair = versionOf(turn).length > 1;
  const chips = h("div", { className: "chips" });
  const text = h("div", { className: "text" });
  const problem = h("p", { className: "problem", role: "alert", hidden: true });
  const foot = h("div", { className: "foot" });
  const root = h("article", { className: `answer ${answer.kind}`, "aria-label": pair ? `Answer, ${answer.kind}` : "Answer" },
    h("div", { className: "over" }, chips), text, problem, foot);
  const show = () => {
    root.dataset.status = answer.status;
    root.setAttribute("aria-busy", String(answer.status === "waiting" || answer.status === "talking"));
    chips.replaceChildren(...chipsOf(answer, pair));
    if (answer.text) renderMarkdown(text, answer.text, marksOf(answer), toneOf(movedOnly(answer, answer.steering)));
    else text.replaceChildren(answer.status === "waiting" ? waitingSign(answer) : "");
    problem.hidden = !answer.problem;
    if (problem.dataset.shown !== answer.problem) {
      problem.dataset.shown = answer.problem; // an alert is read again each time it is written
      problem.replaceChildren(answer.problem, last ? button("Try again", () => act.regenerate(turn), { className: "link" }) : "");
    }
    showFoot(foot, turn, answer, side, last, act);
  };
  views.set(answer, show);
  show();
  return root;
}

const waitingSign = (answer) =>
  h("p", { className: "thinking" }, h("span", { className: "dots", "aria-hidden": "true" }, h("i"), h("i"), h("i")), answer.note);

/** Rebuilt only when the answer is over, so that a focused button stays where it is. */
function showFoot(foot, turn, answer, side, last, act) {
  const over = answer.status !== "waiting" && answer.status !== "talking";
  foot.querySelector(".facts")?.replaceChildren(factsOf(answer));
  if (foot.dataset.over === String(over)) return;
  foot.dataset.over = String(over);
  const parts = [h("span", { className: "facts" }, factsOf(answer))];
  if (over) parts.push(...buttonsOf(turn, answer, side, last, act));
  foot.replaceChildren(...parts);
}

function buttonsOf(turn, answer, side, last, act) {
  const parts = answer.text ? [button("Copy", () => copy(answer.text))] : [];
  const pair = versionOf(turn).length > 1;
  if (pair) {
    const chosen = turn.chosen === side;
    parts.push(button(chosen ? "Goes on from here" : "Go on from this one", () => { turn.chosen = side; save(); act.show(); }, { "aria-pressed": String(chosen) }));
  }
  if (side > 0) return parts;
  if (last && !answer.problem) parts.push(button("Regenerate", () => act.regenerate(turn)));
  if (turn.versions.length > 1) {
    const turnTo = (version) => { turn.version = version; turn.chosen = 0; save(); act.show(); };
    const count = turn.versions.length;
    parts.push(h("span", { className: "versions" },
      button("‹", () => turnTo(turn.version - 1), { "aria-label": "Earlier version", disabled: turn.version === 0 }),
      `${turn.version + 1} / ${count}`,
      button("›", () => turnTo(turn.version + 1), { "aria-label": "Later version", disabled: turn.version === count - 1 })));
  }
  return parts;
}

function factsOf(answer) {
  const { status, tokens, seconds, sampling, finish, left_out } = answer;
  const reading = meanReading(answer);
  if (!tokens) return status === "stopped" ? "Stopped" : "";
  const facts = [`${tokens} tokens`];
  if (seconds > 0.5) facts.push(`${(tokens / seconds).toFixed(1)}/s`);
  facts.push(`seed ${sampling.seed}`);
  if (reading) facts.push(reading);
  if (status === "stopped") facts.push("stopped");
  if (left_out) facts.push(`${left_out === 1 ? "the oldest turn" : `the ${left_out} oldest turns`} left out: the context is full`);
  if (finish === "length") facts.push("cut at the limit");
  return facts.join(" · ");
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    notice("Copied.");
  } catch {
    notice("The browser did not allow copying."); // it does so only on localhost and over https
  }
}

const toneOf = (steering) => tone(state.steerings, steering);

/** The dials at which an answer was said, one chip each, with where they moved to. */
function chipsOf(answer, pair) {
  if (answer.kind === "unsteered") return [h("span", { className: "chip", "data-tone": "none" }, "unsteered")];
  const positions = [answer.steering, ...answer.moves.map((move) => move.steering)];
  const chips = Object.keys(answer.steering).map((name) => {
    const values = positions.map((each) => shown(steeringOf(name), each[name])).filter((value, i, all) => value !== all[i - 1]);
    if (values.length === 1 && values[0] === "off") return null;
    const path = values.length > 3 ? [values[0], "…", values.at(-1)] : values;
    const chip = h("span", { className: "chip", title: values.join(" → ") }, h("b", {}, name), ` ${path.join(" → ")}`);
    setTone(chip, toneOf({ [name]: positions.at(-1)[name] }));
    return chip;
  }).filter(Boolean);
  if (!chips.length) chips.push(h("span", { className: "chip", "data-tone": "none" }, pair ? "steered, all dials off" : "dials off"));
  return chips;
}

/** The dials of `steering` that moved in this answer: of those that stood still the text tells nothing. */
function movedOnly(answer, steering) {
  const moved = (name) => answer.moves.some((move) => move.steering[name] !== answer.steering[name]);
  return Object.fromEntries(Object.entries(steering).filter(([name]) => moved(name)));
}

/** What to mark in the text: its moves, and with readings the words in their colours in place of the moves' lines. */
function marksOf(answer) {
  const moves = movesOf(answer);
  const read = readMarks(answer);
  return read ? [...moves.map((move) => ({ ...move, tone: undefined })), ...read].sort((one, other) => one.at - other.at) : moves;
}

/** Where the dials moved: every move has its tone, and the last of a flurry its label. */
function movesOf(answer) {
  let told = answer.steering;
  return answer.moves.map((move, index) => {
    const next = answer.moves[index + 1];
    const tone = toneOf(movedOnly(answer, move.steering));
    if (next && next.at - move.at < CLOSE) return { at: move.at, label: "", tone, source: move };
    const changed = Object.keys(move.steering).filter((name) => move.steering[name] !== told[name]);
    const several = Object.keys(move.steering).length > 1;
    const label = changed.map((name) => (several ? `${name} ` : "") + shown(steeringOf(name), move.steering[name])).join(", ");
    told = move.steering;
    return { at: move.at, label, tone, chipTone: tone, source: move };
  });
}
