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

/** Fill `target` with `text`. moves: [{at, label, tone}] in order, each said from character `at` on. */
export function renderMarkdown(target, text, moves, firstTone) {
  const fragment = render(text);
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  if (moves.length) markMoves(fragment, moves.map((move) => ({ ...move, letters: lettersIn(text.slice(0, move.at)) })), firstTone);
  target.replaceChildren(fragment);
}

const counted = new Map(); // a text that was said does not change: each move's is counted once

function lettersIn(text) {
  if (!counted.has(text)) {
    if (counted.size > 500) counted.clear();
    counted.set(text, [...render(text).textContent].filter((c) => LETTER.test(c)).length);
  }
  return counted.get(text);
}

/** Put a chip where each move took place, and underline what was said in the tone of its dial. */
function markMoves(fragment, moves, firstTone) {
  const walker = document.createTreeWalker(fragment, NodeFilter.SHOW_TEXT);
  const nodes = [];
  while (walker.nextNode()) nodes.push(walker.currentNode);
  const left = [...moves];
  let letters = 0;
  let tone = firstTone;
  for (const node of nodes) {
    const pieces = [];
    let piece = "";
    for (const character of node.data) {
      if (LETTER.test(character)) letters += 1;
      while (left.length && letters > left[0].letters) {
        const head = piece.trimEnd(); // the blank before a word belongs to it
        pieces.push(...toned(head, tone));
        piece = piece.slice(head.length);
        if (left[0].label) pieces.push(chip(left[0]));
        tone = left.shift().tone;
      }
      piece += character;
    }
    node.replaceWith(...pieces, ...toned(piece, tone));
  }
  const end = left.filter((move) => move.label).map(chip); // nothing was said since
  (nodes.at(-1) ? fragment.lastElementChild : fragment)?.append(...end);
}

function toned(text, tone) {
  const words = text.trimStart();
  const span = h("span", { className: "said" }, words);
  setTone(span, tone);
  return [text.slice(0, text.length - words.length), words ? span : ""];
}

function chip({ label, tone }) {
  const mark = h("span", { className: "moved", title: "The dial moved here" }, h("span", { className: "hidden" }, " (dial moved to "), label, h("span", { className: "hidden" }, ") "));
  setTone(mark, tone);
  return mark;
}

/** Colour an element by its dial: towards the negative end cool, towards the positive end warm, at 0 neither. */
export function setTone(element, tone) {
  element.dataset.tone = tone > 0.02 ? "warm" : tone < -0.02 ? "cool" : "none";
  element.style.setProperty("--tone", `${Math.round(35 + 65 * Math.abs(tone))}%`);
}
