// Whether the server is there: asked every few seconds, told in the banner, found again without a reload.

import { getSteering, health } from "./api.js";
import { $, button, notice } from "./dom.js";
import { askKey } from "./key.js";
import { setSteerings } from "./state.js";

const PERIOD = { up: 5000, loading: 1500, down: 1500, locked: 5000 };
const BANNER = {
  down: "The server cannot be reached. Trying again …",
  loading: "The model is loading …",
  locked: "This server wants a key.",
};

let condition = "";
let timer = 0;
let loaded = () => {};

/** Watch the server from now on; `onloaded` is called whenever its steerings were read. */
export function watch(onloaded) {
  loaded = onloaded;
  check();
}

/** Ask now, as after a failed request; `again`: read the steerings even if the server never seemed away. */
export async function check(again = false) {
  clearTimeout(timer);
  const before = condition;
  const found = await ask();
  if (found !== "up") show(found);
  else if (again || !["up", "locked"].includes(before)) await load(before === "down");
  clearTimeout(timer); // two checks may have run at once
  timer = setTimeout(() => check(), PERIOD[condition] ?? PERIOD.down);
}

async function ask() {
  try {
    await health();
    return "up";
  } catch (error) {
    return error.status === 503 ? "loading" : "down";
  }
}

/** Read the steerings, asking for the key as often as it is refused. */
async function load(returned) {
  try {
    setSteerings(await getSteering());
    show("up");
    loaded();
    if (returned) notice("The server is back.");
  } catch (error) {
    if (error.status !== 401) return show("down");
    show("locked");
    if (await askKey()) await load(returned);
  }
}

function show(now) {
  if (condition === now) return;
  condition = now;
  document.body.dataset.server = now;
  $("banner").hidden = now === "up";
  $("banner").replaceChildren(BANNER[now] ?? "");
  if (now === "locked") $("banner").append(" ", button("Enter the key", () => askKey().then((given) => given && load(false))));
}
