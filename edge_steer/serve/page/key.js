// The dialog that asks for the server's key.

import { key } from "./api.js";
import { $ } from "./dom.js";

let asking = null;

/** Ask for a key; true where one was given. Several callers at once share one dialog. */
export function askKey() {
  asking ??= new Promise((resolve) => {
    const dialog = $("key-dialog");
    $("key-why").textContent = key.get() ? "It refused the last one. Enter it again." : "Enter the one it was started with (--api-key).";
    $("key").value = "";
    $("key-form").onsubmit = (event) => {
      event.preventDefault();
      key.set($("key").value.trim());
      dialog.close("given");
    };
    $("key-cancel").onclick = () => dialog.close("");
    dialog.onclose = () => {
      asking = null;
      resolve(dialog.returnValue === "given");
    };
    dialog.returnValue = "";
    dialog.showModal();
  });
  return asking;
}
