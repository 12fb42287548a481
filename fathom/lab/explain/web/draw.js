// Small helpers for drawing with nodes. Nothing here takes markup: text is always text.

/** An element; `props` are attributes, `on...` listeners, `class`, `text` and `style` (an object of custom properties). */
function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") element.className = value;
    else if (name === "text") element.textContent = value;
    else if (name === "style") for (const [key, each] of Object.entries(value)) element.style.setProperty(key, each);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child || child === 0));
  return element;
}

const byId = (id) => document.getElementById(id);

/** The text of a special token in letters that every font has; other texts as they are. */
const plain = (text) => text.replaceAll("｜", "|").replaceAll("▁", "_");

/** A token's text with its invisible characters made visible. */
function visible(text) {
  return plain(text).replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/^ /, "␣").replace(/ $/, "␣") || "∅";
}

/** 0.03214 -> "0.032", 0.00001 -> "1e-5". */
function number(value) {
  const size = Math.abs(value);
  if (size !== 0 && size < 0.0005) return value.toExponential(0);
  return value.toFixed(size < 10 ? 3 : 1);
}

const percent = (share) => (share > 0 && share < 0.0005 ? "< 0.1%" : `${(100 * share).toFixed(1)}%`);

/** Rows of {name, value, note, picked, text}: a name, a bar as long as the value, the value in digits. */
function bars(rows, { most = Math.max(...rows.map((row) => row.value), 0), show = number, label }) {
  return h("table", { class: "bars" }, h("caption", { text: label }), h("tbody", {}, rows.map((row) =>
    h("tr", { class: row.picked ? "picked" : null }, h("th", { scope: "row" }, row.name),
      h("td", { class: "track" }, h("span", { class: "bar", style: { "--share": String(most > 0 ? Math.max(0, row.value / most) : 0) } })),
      h("td", { class: "digits", text: show(row.value) }), row.note !== undefined && h("td", { class: "note" }, row.note)))));
}

/** A matrix as a table whose cells are shaded by their values. */
function matrix(rows, { label, rowName, columnName }) {
  const sum = (list) => list.reduce((total, each) => total + each, 0);
  const columns = rows[0].map((_, column) => sum(rows.map((row) => row[column])));
  return h("table", { class: "matrix" }, h("caption", { text: label }),
    h("thead", {}, h("tr", {}, h("td"), rows[0].map((_, column) => h("th", { scope: "col", text: columnName(column) })), h("th", { scope: "col", text: "sum" }))),
    h("tbody", {}, rows.map((row, at) => h("tr", {}, h("th", { scope: "row", text: rowName(at) }),
      row.map((value) => h("td", { class: "cell", style: { "--heat": String(value) }, text: value.toFixed(3) })), h("td", { class: "sum", text: sum(row).toFixed(2) })))),
    h("tfoot", {}, h("tr", {}, h("th", { scope: "row", text: "sum" }), columns.map((value) => h("td", { class: "sum", text: value.toFixed(2) })), h("td"))));
}

/** Columns side by side, one for each value; `picked` ones stand out. A picture beside a table, hidden from screen readers. */
function columns(values, picked, focus) {
  const most = Math.max(...values, 0);
  const least = Math.min(...values, 0);
  const span = most - least || 1;
  return h("div", { class: "columns", "aria-hidden": "true", style: { "--zero": String(-least / span) } }, values.map((value, at) =>
    h("span", { class: picked.has(at) ? "column picked" : "column", title: `entry ${at}: ${number(value)}`, onclick: () => focus(at),
      style: { "--height": String(Math.abs(value) / span), "--base": String((Math.min(value, 0) - least) / span) } })));
}
