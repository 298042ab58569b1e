// A model's text as safe HTML, with the places marked at which the dial moved.
//
// The text is not trusted: HTML in it is shown as text, what marked makes of the rest is sanitized, images are not
// loaded. A move is carried through the markdown as one private-use character and becomes a chip in the result.

import DOMPurify from "./vendor/purify.js";
import { marked } from "./vendor/marked.js";
import { h } from "./dom.js";

const FIRST_MARK = 0xe000;
const MARKS = /([\ue000-\uf8ff])/;
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

/** Where in `text` a mark at `at` may stand without breaking markdown: behind the last word said before it. */
function behindWord(text, at) {
  const link = text.slice(0, at).match(/\S*(?:\]\(|:\/\/)\S*$/);
  const before = text.slice(0, link ? link.index : at);
  return before.length - before.match(/(?:\n[ \t]*\d+[.)])?[\s*_~`|#>+\-[\]()]*$/)[0].length;
}

/** Fill `target` with `text`. moves: [{at, label, tone}] in order, each said from character `at` on. */
export function renderMarkdown(target, text, moves, firstTone) {
  const source = text.replace(/[\ue000-\uf8ff]/g, "\ufffd"); // nobody else may write our marks
  let withMarks = "";
  let done = 0;
  moves.forEach(({ at }, index) => {
    const place = Math.max(done, behindWord(source, at));
    withMarks += source.slice(done, place) + String.fromCharCode(FIRST_MARK + (index % 6400));
    done = place;
  });
  const fragment = DOMPurify.sanitize(marked.parse(withMarks + source.slice(done)), CLEAN);
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  if (moves.length) markMoves(fragment, moves, firstTone);
  target.replaceChildren(fragment);
}

/** Replace the marks by chips, and underline what was said in the tone of its dial. */
function markMoves(fragment, moves, firstTone) {
  const walker = document.createTreeWalker(fragment, NodeFilter.SHOW_TEXT);
  const nodes = [];
  while (walker.nextNode()) nodes.push(walker.currentNode);
  let tone = firstTone;
  for (const node of nodes) {
    const pieces = node.data.split(MARKS).filter((piece) => piece !== "").map((piece) => {
      const move = MARKS.test(piece) ? moves[piece.charCodeAt(0) - FIRST_MARK] : null;
      if (move) tone = move.tone;
      if (move) return move.label ? chip(move) : "";
      return toned(piece, tone);
    }).flat();
    node.replaceWith(...pieces);
  }
  for (const element of fragment.querySelectorAll("[href], [title]")) {
    for (const name of ["href", "title"]) {
      if (MARKS.test(element.getAttribute(name) ?? "")) element.removeAttribute(name);
    }
  }
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
