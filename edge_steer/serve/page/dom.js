// Elements from plain values. Text always becomes text nodes: nothing here reads HTML.

export const $ = (id) => document.getElementById(id);

/** An element: h("button", {type: "button", onclick: f}, "Copy"). `aria-*`, `data-*` and `role` become attributes. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name.includes("-") || name === "role" || name === "for") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** A button with words on it, and where they do not say enough, a longer label. */
export function button(text, onclick, properties = {}) {
  return h("button", { type: "button", className: "quiet", onclick, ...properties }, text);
}

let noticeTimer = 0;

/** Say `text` for a few seconds at the foot of the page, with an action if there is one. */
export function notice(text, action = null) {
  clearTimeout(noticeTimer);
  const close = () => $("notice").replaceChildren();
  const act = action && button(action.text, () => { close(); action.run(); });
  $("notice").replaceChildren(h("p", {}, text, act));
  noticeTimer = setTimeout(close, action ? 8000 : 4000);
}

/** Have a screen reader say `text`, after what it says now. */
export function announce(text) {
  const line = h("p", {}, text);
  $("announcer").append(line);
  while ($("announcer").childElementCount > 20) $("announcer").firstElementChild.remove();
}
