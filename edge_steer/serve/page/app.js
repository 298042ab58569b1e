// The page of `edge-steer serve`: what the buttons and keys do. What each part knows stands in its own file.

import { isRunning, moveLive, newVersion, say, stopAll } from "./answering.js";
import { showDials } from "./dials.js";
import { $, button, h, notice } from "./dom.js";
import { watch } from "./health.js";
import { showSettings } from "./settings.js";
import { exported, messagesFor, save, saveNow, state } from "./state.js";
import { scrollToEnd, showAnswer, showTurns } from "./turns.js";

const SAMPLES = ["Write one sentence about the sea.", "How was your day?", "What do you think about the future?"];

const act = { regenerate, show: () => showTurns(act) };

/** Add a turn, and have it answered. */
async function ask(prompt) {
  if (isRunning() || !prompt.trim()) return;
  const turn = { prompt, versions: [newVersion(state.compare)], version: 0, chosen: 0 };
  state.turns.push(turn);
  await answer(turn);
}

/** Answer the last turn once more, at the present dials; an answer that failed before its first word makes room. */
async function regenerate(turn) {
  if (isRunning()) return;
  if (turn.versions[turn.version].every(({ text }) => !text)) turn.versions.splice(turn.version, 1);
  turn.versions.push(newVersion(state.compare));
  turn.version = turn.versions.length - 1;
  turn.chosen = 0;
  await answer(turn);
}

async function answer(turn) {
  const messages = messagesFor(turn);
  const answers = turn.versions[turn.version];
  const all = Promise.all(answers.map((each) => say(each, messages, showAnswer)));
  act.show();
  scrollToEnd();
  showRunning();
  save();
  await all;
  showRunning();
}

function showRunning() {
  $("send").hidden = isRunning();
  $("stop").hidden = !isRunning();
}

function connectComposer() {
  const prompt = $("prompt");
  const fit = () => {
    prompt.style.height = "auto";
    prompt.style.height = `${Math.min(prompt.scrollHeight, 200)}px`;
  };
  prompt.oninput = fit;
  prompt.onkeydown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    $("composer").requestSubmit();
  };
  $("composer").onsubmit = (event) => {
    event.preventDefault();
    if (isRunning() || !prompt.value.trim()) return;
    ask(prompt.value);
    prompt.value = "";
    fit();
    prompt.focus();
  };
  $("stop").onclick = () => { stopAll(); prompt.focus(); };
  $("compare").checked = state.compare;
  $("compare").onchange = () => { state.compare = $("compare").checked; save(); };
  $("samples").replaceChildren(...SAMPLES.map((text) => h("li", {}, button(text, () => { ask(text); prompt.focus(); }))));
}

function connectTop() {
  $("new").onclick = () => {
    stopAll();
    const before = state.turns;
    state.turns = [];
    act.show();
    save();
    if (before.length) notice("Conversation cleared.", { text: "Undo", run: () => { state.turns = before; act.show(); save(); } });
  };
  $("export").onclick = () => {
    const file = new Blob([`${JSON.stringify(exported(), null, 2)}\n`], { type: "application/json" });
    const link = h("a", { href: URL.createObjectURL(file), download: `edge-steer-${new Date().toISOString().slice(0, 16).replace(":", "")}.json` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
}

/** On a narrow screen the panel is a drawer over the lower half: the conversation stays in sight above it. */
function connectDrawer() {
  const narrow = matchMedia("(max-width: 860px)");
  const set = (open) => {
    document.body.classList.toggle("drawer", open);
    $("drawer-open").setAttribute("aria-expanded", String(open));
    $("panel").inert = narrow.matches && !open;
  };
  $("drawer-open").onclick = () => {
    set(!document.body.classList.contains("drawer"));
    scrollToEnd(); // the drawer covers where the answer stood
    if (!$("panel").inert) ($("panel").querySelector("input[type=range]") ?? $("drawer-close")).focus();
  };
  $("drawer-close").onclick = () => { set(false); $("drawer-open").focus(); };
  narrow.onchange = () => set(false);
  set(false);
  return () => document.body.classList.contains("drawer") && (set(false), $("drawer-open").focus());
}

const closeDrawer = connectDrawer();
connectComposer();
connectTop();
showSettings();
showDials(moveLive, act.show);
act.show();
scrollToEnd();
addEventListener("pagehide", saveNow);
addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || $("key-dialog").open) return;
  if (isRunning()) stopAll();
  else closeDrawer();
});
let shownSteerings = "";
watch(() => {
  $("model").textContent = state.model;
  document.title = `${state.model} · edge-steer`;
  const steerings = JSON.stringify(state.steerings);
  if (steerings !== shownSteerings) showDials(moveLive, act.show); // else a hand may be on a slider
  shownSteerings = steerings;
});
