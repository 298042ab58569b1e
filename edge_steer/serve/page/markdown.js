// A model's text as safe HTML, with the places marked at which the dial moved.
//
// The text is not trusted: HTML in it is shown as text, what marked makes of the rest is sanitized, images are not
// loaded. A move stands at a place in the source; it is found in the result by counting letters, so that no mark can
// break the markdown around it.

import DOMPurify from "./vendor/purify.js";
import { marked } from "./vendor/marked.js";
import { h } from "./dom.js";

const LETTER = /[\p{L}\p{N}]/u;
const TAGS = [
  "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre", "strong",
  "table", "tbody", "td", "th", "thead", "tr", "ul",
];
const CLEAN = {
  ALLOWED_TAGS: TAGS, ALLOWED_ATTR: ["href", "start", "title"], ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  RETURN_DOM_FRAGMENT: true,
};

const escape = (text) => text.replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
marked.use({
  gfm: true, breaks: true,
  renderer: { html: ({ text }) => escape(text), image: ({ text }) => escape(text), checkbox: ({ checked }) => (checked ? "☑ " : "☐ ") },
});

const render = (text) => DOMPurify.sanitize(marked.parse(text), CLEAN);

/** Fill `target` with `text`. marks: [{at, label, tone, chipTone, title, source}] in order, each for what was said from character
 *  `at` on. With a label it is a chip, and without a tone that alone; with a title it colours words, else it underlines.
 *  source: an object that stays the same, for a mark that is made anew. */
export function renderMarkdown(target, text, marks, firstTone) {
  const fragment = render(text);
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  if (marks.length) mark(fragment, marks.map((each) => ({ ...each, letters: lettersBefore(each, text) })), { tone: firstTone });
  target.replaceChildren(fragment);
}

const counted = new WeakMap(); // a text that was said does not change: each mark's is counted once

function lettersBefore({ at, source }, text) {
  const known = counted.get(source);
  if (known !== undefined) return known;
  const letters = [...render(text.slice(0, at)).textContent].filter((c) => LETTER.test(c)).length;
  if (source) counted.set(source, letters);
  return letters;
}

/** Put a chip where each move took place, and underline or colour what was said since. */
function mark(fragment, marks, first) {
  const walker = document.createTreeWalker(fragment, NodeFilter.SHOW_TEXT);
  const nodes = [];
  while (walker.nextNode()) nodes.push(walker.currentNode);
  const left = [...marks];
  let letters = 0;
  let style = first;
  for (const node of nodes) {
    const pieces = [];
    let piece = "";
    for (const character of node.data) {
      if (LETTER.test(character)) letters += 1;
      while (left.length && letters > left[0].letters) {
        const head = piece.trimEnd(); // the blank before a word belongs to it
        pieces.push(...styled(head, style));
        piece = piece.slice(head.length);
        if (left[0].label) pieces.push(chip(left[0]));
        const now = left.shift();
        if (now.tone !== undefined) style = now;
      }
      piece += character;
    }
    node.replaceWith(...pieces, ...styled(piece, style));
  }
  const end = left.filter((move) => move.label).map(chip); // nothing was said since
  (nodes.at(-1) ? fragment.lastElementChild : fragment)?.append(...end);
}

function styled(text, { tone, title }) {
  const words = text.trimStart();
  const span = h("span", { className: title ? "read" : "said", title }, words);
  setTone(span, tone);
  return [text.slice(0, text.length - words.length), words ? span : ""];
}

function chip({ label, tone, chipTone = tone }) {
  const mark = h("span", { className: "moved", title: "The dial moved here" }, h("span", { className: "hidden" }, " (dial moved to "), label, h("span", { className: "hidden" }, ") "));
  setTone(mark, chipTone);
  return mark;
}

/** Colour an element by its dial: towards the negative end cool, towards the positive end warm, at 0 neither. */
export function setTone(element, tone) {
  element.dataset.tone = tone > 0.02 ? "warm" : tone < -0.02 ? "cool" : "none";
  element.style.setProperty("--tone", `${Math.round(35 + 65 * Math.abs(tone))}%`);
}
