// System prompt, sampling and theme.

import { $, h } from "./dom.js";
import { save, state } from "./state.js";

const FIELDS = [
  { name: "temperature", text: "Temperature", min: 0, max: 5, step: 0.05, tells: "0 always takes the likeliest token" },
  { name: "top_p", text: "Top p", min: 0, max: 1, step: 0.01, tells: "only the likeliest tokens that together have this probability" },
  { name: "top_k", text: "Top k", min: 0, max: 100000, step: 1, tells: "only this many of the likeliest tokens; 0: all" },
  { name: "min_p", text: "Min p", min: 0, max: 1, step: 0.01, tells: "only tokens at least this share as likely as the likeliest" },
  { name: "repeat_penalty", text: "Repeat penalty", min: 0.1, max: 3, step: 0.05, tells: "above 1, words said lately become less likely" },
  { name: "max_tokens", text: "Max tokens", min: 1, max: 1000000, step: 1, tells: "the longest answer" },
  { name: "seed", text: "Seed", min: 0, max: 4294967295, step: 1, tells: "the same seed gives the same answer at the same dials" },
];
const THEMES = ["auto", "light", "dark"];

export function showSettings() {
  $("system").value = state.system;
  $("system").oninput = () => { state.system = $("system").value; save(); };
  $("system-box").open = state.system !== "";
  $("sampling").replaceChildren(...FIELDS.map(field));
  showTheme();
}

function field({ name, text, min, max, step, tells }) {
  const id = `sampling-${name}`;
  const whole = Number.isInteger(step);
  const input = h("input", { type: "number", id, min, max, step: whole ? step : "any", placeholder: name === "seed" ? "random" : "default", value: state.sampling[name] ?? "", title: tells });
  const wrong = h("small", { className: "warning", id: `${id}-wrong`, role: "status" });
  input.setAttribute("aria-describedby", `${id}-wrong`);
  input.oninput = () => {
    const valid = input.validity.valid;
    input.setAttribute("aria-invalid", String(!valid));
    wrong.textContent = valid ? "" : `${whole ? "A whole number" : "A number"} from ${min} to ${max}`;
    if (valid) state.sampling[name] = input.value;
    save();
  };
  return h("div", { className: "setting" }, h("label", { for: id }, text), input, wrong);
}

function showTheme() {
  const root = document.documentElement;
  const show = () => {
    $("theme").replaceChildren(h("span", { className: "sign", "aria-hidden": "true" }, "◐ "), h("span", {}, "Theme: "), root.dataset.theme);
    $("theme").setAttribute("aria-label", `Theme: ${root.dataset.theme}`);
  };
  $("theme").onclick = () => {
    root.dataset.theme = THEMES[(THEMES.indexOf(root.dataset.theme) + 1) % THEMES.length];
    localStorage.setItem("edge-steer.theme", root.dataset.theme);
    show();
  };
  show();
}
