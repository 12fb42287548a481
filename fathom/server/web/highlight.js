// Colours for code, one line at a time, so that a growing block costs no more than its last line.

import { h } from "./dom.js";

const WORDS = new Set((
  "abstract and as assert async await break case catch class const continue def default defer del do elif else enum except export extends " +
  "extern false False finally fn for from func function global go goto if impl implements import in instanceof interface is lambda let loop " +
  "match mod mut namespace new nil None nonlocal not null operator or override package pass private protected pub public raise return self " +
  "Self sizeof static struct super switch template this throw trait true True try type typedef typeof undefined unsafe use using var void " +
  "while with yield select where group order by insert into values update set create table join left on limit fi then done esac echo"
).split(" "));
const HASHES = new Set("bash cmake dockerfile ini make makefile perl ps1 py python r rb ruby sh shell toml yaml yml zsh".split(" "));
const DASHES = new Set(["haskell", "hs", "lua", "sql"]);
const PLAIN = new Set(["", "text", "txt", "plain", "console", "output", "md", "markdown", "diff"]);
const STRING = `"(?:[^"\\\\]|\\\\.)*"?|'(?:[^'\\\\]|\\\\.)*'?|\`(?:[^\`\\\\]|\\\\.)*\`?`;
const REST = "\\b\\d[\\w.]*|[A-Za-z_]\\w*(?=\\()|[A-Za-z_]\\w*|@\\w+";

function rules(language) {
  if (PLAIN.has(language)) return null;
  if (HASHES.has(language)) {
    return { token: new RegExp(`#.*|"""|'''|${STRING}|${REST}`, "g"), comment: "#", long: ['"""', "'''"] };
  }
  if (DASHES.has(language)) return { token: new RegExp(`--.*|/\\*|${STRING}|${REST}`, "g"), comment: "--", long: ["/*"] };
  return { token: new RegExp(`//.*|/\\*|<!--|${STRING}|${REST}`, "g"), comment: "//", long: ["/*", "<!--"] };
}

const END = { "/*": "*/", "<!--": "-->", '"""': '"""', "'''": "'''" };

/** Colours lines in order. `state` is the mark of a comment or string that goes on over the end of the line, or null. */
export class Highlighter {
  constructor(language) {
    this.rules = rules(language.toLowerCase());
  }

  /** {nodes, state}: the line in coloured pieces, and the state after it. */
  line(text, state) {
    if (!this.rules) return { nodes: text ? [document.createTextNode(text)] : [], state: null };
    const nodes = [];
    let at = 0;
    const put = (end, kind) => {
      if (end <= at) return;
      const piece = text.slice(at, end);
      nodes.push(kind ? h("span", { class: `hl-${kind}`, text: piece }) : document.createTextNode(piece));
      at = end;
    };
    const { token } = this.rules;
    for (;;) {
      if (state) {
        const opened = at;
        const end = text.indexOf(END[state], opened);
        put(end < 0 ? text.length : end + END[state].length, END[state] === state ? "string" : "comment");
        if (end < 0) return { nodes, state };
        state = null;
      }
      token.lastIndex = at;
      const found = token.exec(text);
      if (!found) break;
      put(found.index, null);
      if (this.rules.long.includes(found[0])) {
        put(found.index + found[0].length, END[found[0]] === found[0] ? "string" : "comment");
        state = found[0];
      } else {
        put(token.lastIndex, this.kind(found[0], text[token.lastIndex]));
      }
    }
    put(text.length, null);
    return { nodes, state };
  }

  kind(token, next) {
    if (token.startsWith(this.rules.comment)) return "comment";
    if ("\"'`".includes(token[0])) return "string";
    if (/\d/.test(token[0])) return "number";
    if (WORDS.has(token)) return "keyword";
    return next === "(" || token[0] === "@" ? "name" : null;
  }
}
