// Inline markdown -> DOM nodes: code, emphasis, links, line breaks. Linear in the text, whatever the text; no markup is ever parsed.

import { h } from "./dom.js";

const DEEPEST = 16; // open emphasis marks and brackets; more stay plain text
const MOST_TICKS = 40; // a longer row of backticks is text
const TOKEN = /<br ?\/?>|\\[\\`*_{}[\]()#+\-.!|~>$<&"]|\\\(|`+|\*+|_+|~~|!?\[|\]|\$|\n|https?:\/\/[^\s<>"'`|*]+/g;
const TARGET = /\(\s{0,8}<?((?:[^\s()<>]|\([^\s()<>]{0,200}\)){0,2000})>?(?:\s{1,8}"[^"]{0,300}")?\s{0,8}\)/y;
const SPACE = /\s/;
const WORD = /[\p{L}\p{N}]/u;

/** The address in full if it is plain http or https, else null. */
export function safeAddress(text) {
  try {
    const url = new URL(text);
    return url.protocol === "https:" || url.protocol === "http:" ? url.href : null;
  } catch {
    return null;
  }
}

/** `text` without those of `characters` that stand at its end. */
export function withoutEnd(text, characters) {
  let end = text.length;
  while (end > 0 && characters.includes(text[end - 1])) end -= 1;
  return text.slice(0, end);
}

function link(address, ...children) {
  return h("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);
}

/** Reads one text once, left to right. `out` holds nodes; `open` the marks that may still be closed, as places in `out`. */
class Inline {
  constructor(text) {
    this.text = text;
    this.at = 0;
    this.out = [];
    this.open = [];
    this.unclosed = new Set(); // ends that are known not to come any more
  }

  read() {
    TOKEN.lastIndex = 0;
    for (let found = TOKEN.exec(this.text); found; found = TOKEN.exec(this.text)) {
      this.plain(found.index);
      this.at = TOKEN.lastIndex;
      this.token(found[0], found.index);
      TOKEN.lastIndex = this.at;
    }
    this.plain(this.text.length);
    return this.out;
  }

  plain(end) {
    if (end > this.at) this.push(this.text.slice(this.at, end));
  }

  push(node) {
    this.out.push(typeof node === "string" ? document.createTextNode(node) : node);
  }

  token(token, start) {
    const first = token[0];
    if (token === "\\(") this.math(token, "\\)", start);
    else if (first === "\\") this.push(token.slice(1));
    else if (first === "`") this.code(token);
    else if (first === "*" || first === "_" || first === "~") this.emphasis(token, start);
    else if (first === "$") this.math(token, "$", start);
    else if (first === "h") this.bare(token);
    else if (first === "\n" || first === "<") this.push(h("br"));
    else if (token === "]") this.closeLink();
    else this.openMark({ char: "[", length: token.length, token });
  }

  /** Where `end` next stands, or -1; looks for an absent end once only. */
  find(end) {
    if (this.unclosed.has(end)) return -1;
    const at = this.text.indexOf(end, this.at);
    if (at < 0) this.unclosed.add(end);
    return at;
  }

  code(ticks) {
    if (ticks.length > MOST_TICKS) {
      this.push(ticks);
      return;
    }
    const closing = new RegExp(`(?<!\`)${ticks}(?!\`)`, "g");
    closing.lastIndex = this.at;
    const found = this.unclosed.has(ticks) ? null : closing.exec(this.text);
    if (!found) {
      this.unclosed.add(ticks);
      this.push(ticks);
      return;
    }
    const inside = this.text.slice(this.at, found.index).replaceAll("\n", " ");
    const padded = inside.startsWith(" ") && inside.endsWith(" ") && inside.trim() !== "";
    this.push(h("code", { text: padded ? inside.slice(1, -1) : inside }));
    this.at = found.index + ticks.length;
  }

  /** Formulas are shown as written, so that their underscores and stars survive. */
  math(token, end, start) {
    const close = this.find(end);
    const inside = close < 0 ? "" : this.text.slice(this.at, close);
    const dollars = end === "$";
    const price = dollars && (SPACE.test(inside[0]) || SPACE.test(inside.at(-1)) || /\d/.test(this.text[close + 1] ?? "")
      || WORD.test(this.text[start - 1] ?? ""));
    if (inside === "" || inside.includes("\n\n") || price) {
      this.push(token);
      return;
    }
    this.push(h("span", { class: "math", text: inside }));
    this.at = close + end.length;
  }

  emphasis(run, start) {
    const before = this.text[start - 1] ?? " ";
    const after = this.text[this.at] ?? " ";
    const words = run[0] === "_" && WORD.test(before) && WORD.test(after);
    let left = run.length;
    if (!SPACE.test(before) && !words) left = this.closeEmphasis(run[0], left);
    if (left && !SPACE.test(after) && !words && left <= 3) {
      if (left >= 2) this.openMark({ char: run[0], length: 2, token: run[0].repeat(2) });
      if (left % 2) this.openMark({ char: run[0], length: 1, token: run[0] });
    } else if (left) {
      this.push(run[0].repeat(left));
    }
  }

  closeEmphasis(char, left) {
    for (let at = this.open.length - 1; at >= 0 && left; at -= 1) {
      const mark = this.open[at];
      if (mark.char === "[") break;
      if (mark.char !== char || mark.length > left || mark.place === this.out.length - 1) continue;
      const tag = char === "~" ? "s" : mark.length === 2 ? "strong" : "em";
      this.open.length = at;
      this.wrap(mark.place, h(tag));
      left -= mark.length;
    }
    return left;
  }

  openMark(mark) {
    if (this.open.length < DEEPEST) this.open.push({ ...mark, place: this.out.length });
    this.push(mark.token);
  }

  /** Puts what follows the mark at `place` into `element`, which takes the mark's place. */
  wrap(place, element) {
    element.append(...this.out.splice(place).slice(1));
    this.out.push(element);
  }

  closeLink() {
    const at = this.open.findLastIndex((mark) => mark.char === "[");
    TARGET.lastIndex = this.at;
    const target = at >= 0 ? TARGET.exec(this.text) : null;
    const address = target && safeAddress(target[1]);
    if (at >= 0) {
      const [mark] = this.open.splice(at);
      if (address) {
        this.wrap(mark.place, link(address));
        this.at += target[0].length;
        return;
      }
    }
    this.push("]");
  }

  bare(token) {
    const inLink = this.open.some((mark) => mark.char === "[");
    const shown = withoutEnd(token, token.includes("(") ? ".,;:!?]" : ".,;:!?])");
    const address = inLink ? null : safeAddress(shown);
    if (address === null) {
      this.push(token);
      return;
    }
    this.push(link(address, shown));
    this.at -= token.length - shown.length;
  }
}

/** The nodes of one run of text. */
export function inline(text) {
  return new Inline(text).read();
}
