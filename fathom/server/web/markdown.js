// Markdown -> DOM, safe and incremental. The text is parsed into blocks; blocks become nodes; nodes that did not change stay.
//
// While an answer streams in, only the text from the last block on is parsed again, and within it only what grew is drawn again.
// Every word of the model ends in a text node or, for links, in an address that `safeAddress` let through.

import { copyButton, h } from "./dom.js";
import { Highlighter } from "./highlight.js";
import { inline, withoutEnd } from "./inline.js";

const DEEPEST = 6; // lists and quotes inside each other; deeper ones stay text
const FENCE = /^ {0,3}(`{3,40}|~{3,40})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|(\d{1,9})[.)])([ \t]+|$)/;
const DIVIDER = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const FORMULA = { "$$": "$$", "\\[": "\\]" };
const blank = (line) => line === undefined || line.trim() === "";

/** A block: its kind, the lines [start, end) it came from, and what it holds. `source` tells whether it changed. */
function block(kind, lines, start, end, more = {}) {
  return { kind, start, end, source: lines.slice(start, end).join("\n"), ...more };
}

function formulaMark(line) {
  const mark = line.trimStart().slice(0, 2);
  return mark in FORMULA ? mark : null;
}

function startsBlock(lines, at, inParagraph) {
  const line = lines[at];
  const item = ITEM.exec(line);
  const listed = item && (!inParagraph || (item[4] !== "" && (item[3] === undefined || item[3] === "1")));
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || listed || formulaMark(line) !== null || isTable(lines, at);
}

function isTable(lines, at) {
  const divider = lines[at + 1];
  return lines[at].includes("|") && divider !== undefined && divider.includes("-") && DIVIDER.test(divider)
    && cells(divider).length === cells(lines[at]).length;
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

/** The blocks of `lines`. */
export function parse(lines, depth = 0) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (blank(lines[at])) {
      at += 1;
      continue;
    }
    const next = parseBlock(lines, at, depth);
    blocks.push(next);
    at = next.end;
  }
  return blocks;
}

function parseBlock(lines, at, depth) {
  const line = lines[at];
  const heading = HEADING.exec(line);
  if (FENCE.test(line)) return parseFence(lines, at);
  if (heading) return block("heading", lines, at, at + 1, { level: heading[1].length, text: withoutEnd(heading[2] ?? "", " \t#") });
  if (RULE.test(line)) return block("rule", lines, at, at + 1);
  if (formulaMark(line)) return parseFormula(lines, at);
  if (QUOTE.test(line) && depth < DEEPEST) return parseQuote(lines, at, depth);
  if (ITEM.test(line) && depth < DEEPEST) return parseList(lines, at, depth);
  if (isTable(lines, at)) return parseTable(lines, at);
  let end = at + 1;
  while (end < lines.length && !blank(lines[end]) && !startsBlock(lines, end, true)) end += 1;
  return block("paragraph", lines, at, end, { text: lines.slice(at, end).map((each) => each.trim()).join("\n") });
}

function parseFence(lines, at) {
  const [, ticks, info] = FENCE.exec(lines[at]);
  const indent = lines[at].length - lines[at].trimStart().length;
  const closing = new RegExp(`^ {0,3}\\${ticks[0]}{${ticks.length},}[ \\t]*$`);
  let end = at + 1;
  while (end < lines.length && !closing.test(lines[end])) end += 1;
  const closed = end < lines.length;
  const growing = !closed && end > at + 1 && withoutEnd(lines[end - 1].trim(), ticks[0]) === ""; // perhaps a closing fence one day
  const body = lines.slice(at + 1, growing ? end - 1 : end).map((line) => line.slice(Math.min(indent, line.length - line.trimStart().length)));
  const language = info.trim().split(/[\s{,:]/)[0];
  return block("code", lines, at, Math.min(end + 1, lines.length), { language, lines: body });
}

function parseFormula(lines, at) {
  const close = FORMULA[formulaMark(lines[at])];
  let end = at;
  while (end < lines.length && lines[end].indexOf(close, end === at ? lines[at].length - lines[at].trimStart().length + 2 : 0) < 0) end += 1;
  end = Math.min(end + 1, lines.length);
  const text = lines.slice(at, end).join("\n").trim().slice(2);
  return block("formula", lines, at, end, { text: (text.endsWith(close) ? text.slice(0, -2) : text).trim() });
}

function parseQuote(lines, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  return block("quote", lines, at, end, { blocks: parse(lines.slice(at, end).map((line) => line.replace(QUOTE, "")), depth + 1) });
}

function parseList(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  const ordered = first[3] !== undefined;
  const items = [];
  let end = at;
  while (end < lines.length) {
    const mark = ITEM.exec(lines[end]);
    if (!mark || (mark[3] !== undefined) !== ordered || RULE.test(lines[end])) break;
    const item = parseItem(lines, end, mark, depth);
    items.push(item);
    end = item.end;
    let next = end;
    while (next < lines.length && blank(lines[next])) next += 1;
    if (next < lines.length && ITEM.test(lines[next])) end = next;
  }
  return block("list", lines, at, items.at(-1).end, { ordered, first: ordered ? Number(first[3]) : null, blocks: items });
}

/** One item: its first line and what is indented below it. */
function parseItem(lines, at, mark, depth) {
  const width = Math.min(mark[0].length, mark[1].length + mark[2].length + 4);
  const inner = [lines[at].slice(width)];
  let end = at + 1;
  for (let next = end; next < lines.length; next += 1) {
    const indent = lines[next].length - lines[next].trimStart().length;
    const inside = indent >= Math.min(width, 2 + mark[1].length);
    if (!blank(lines[next]) && !inside && (blank(lines[next - 1]) || startsBlock(lines, next, false))) break;
    inner.push(lines[next].slice(Math.min(indent, width)));
    if (!blank(lines[next])) end = next + 1;
  }
  return block("item", lines, at, end, { blocks: parse(inner.slice(0, end - at), depth + 1) });
}

function parseTable(lines, at) {
  const aligns = cells(lines[at + 1]).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "left"));
  const row = (start, tag) => block("row", lines, start, start + 1, { tag, aligns, cells: cells(lines[start]) });
  const rows = [];
  let end = at + 2;
  for (; end < lines.length && !blank(lines[end]) && lines[end].includes("|"); end += 1) rows.push(row(end, "td"));
  return block("table", lines, at, end, { head: row(at, "th"), rows });
}

/** How each kind is drawn, and for those that hold others, how a drawn one is brought up to date. */
const DRAW = {
  paragraph: (it) => h("p", {}, ...inline(it.text)),
  heading: (it) => h(`h${Math.min(it.level + 1, 6)}`, {}, ...inline(it.text)),
  rule: () => h("hr"),
  formula: (it) => h("pre", { class: "formula", text: it.text, tabindex: 0 }),
  quote: (it) => grow(h("blockquote"), it),
  list: (it) => grow(it.ordered ? h("ol", { start: it.first === 1 ? null : it.first }) : h("ul"), it),
  item: (it) => grow(h("li"), it),
  row: (it) => h("tr", {}, ...it.aligns.map((align, at) => h(it.tag, { class: `to-${align}`, scope: it.tag === "th" ? "col" : null },
    ...inline(it.cells[at] ?? "")))),
  table: (it) => {
    const body = h("tbody");
    const table = h("table", {}, h("thead", {}, draw(it.head)), body);
    return growTable(h("div", { class: "table", tabindex: 0, role: "region", "aria-label": "Table" }, table), it);
  },
  code: (it) => growCode(emptyCode(it), it),
};

const GROW = { quote: grow, list: grow, item: grow, table: growTable, code: growCode };

function draw(it) {
  const element = DRAW[it.kind](it);
  element.drawn = it;
  return element;
}

function grow(element, it) {
  reconcile(element, it.blocks, 0);
  return element;
}

function growTable(element, it) {
  reconcile(element.querySelector("tbody"), it.rows, 0);
  return element;
}

function emptyCode(it) {
  const code = h("code", {}, h("span"));
  const figure = h("figure", { class: "code" },
    h("figcaption", {}, h("span", { text: it.language || "text" }), copyButton(() => figure.drawn.lines.join("\n"), "Copy code")),
    h("pre", { tabindex: 0 }, code));
  Object.assign(figure, { code, highlighter: new Highlighter(it.language), done: 0, state: null });
  return figure;
}

/** Lines before the last are drawn once; the last one, in the span at the end, until it is whole. */
function growCode(figure, it) {
  const last = figure.code.lastChild;
  for (; figure.done < it.lines.length - 1; figure.done += 1) {
    const { nodes, state } = figure.highlighter.line(it.lines[figure.done], figure.state);
    last.before(...nodes, "\n");
    figure.state = state;
  }
  last.replaceChildren(...figure.highlighter.line(it.lines.at(-1) ?? "", figure.state).nodes);
  return figure;
}

/** Code grows only by lines below and characters in its last line; anything else is drawn anew. */
function canGrow(old, it) {
  return it.kind in GROW && old.kind === it.kind && old.ordered === it.ordered && it.source.startsWith(old.source)
    && (it.kind !== "code" || (old.language === it.language && old.lines.length <= it.lines.length))
    && (it.kind !== "table" || String(old.head.aligns) === String(it.head.aligns));
}

/** Makes the children of `parent` from the index `from` on show `blocks`, and leaves alone those that already do. */
function reconcile(parent, blocks, from) {
  blocks.forEach((it, at) => {
    const element = parent.childNodes[from + at];
    if (!element) parent.append(draw(it));
    else if (element.drawn.kind === it.kind && element.drawn.source === it.source) return;
    else if (canGrow(element.drawn, it)) {
      GROW[it.kind](element, it);
      element.drawn = it;
    } else element.replaceWith(draw(it));
  });
  while (parent.childNodes.length > from + blocks.length) parent.lastChild.remove();
}

/** Shows a text that grows at its end. */
export class MarkdownView {
  constructor(root) {
    this.root = root;
    this.settled = 0; // characters whose blocks cannot change any more
    this.fixed = 0; // how many blocks those are
    this.shown = "";
  }

  update(text) {
    if (text === this.shown) return;
    if (!text.startsWith(this.shown)) this.settled = this.fixed = 0;
    this.shown = text;
    this.settle(text);
    reconcile(this.root, parse(text.slice(this.settled).split("\n")), this.fixed);
  }

  /** Every block but the last that begins in a whole line is final. */
  settle(text) {
    const whole = text.slice(this.settled, text.lastIndexOf("\n") + 1);
    const lines = whole.split("\n");
    const blocks = parse(lines);
    if (blocks.length < 2) return;
    const last = blocks.at(-1).start;
    reconcile(this.root, blocks.slice(0, -1), this.fixed);
    this.fixed += blocks.length - 1;
    for (const line of lines.slice(0, last)) this.settled += line.length + 1;
  }
}
