// Small helpers for building pages out of nodes. Nothing here takes markup: text is always text.

const SVG = "http://www.w3.org/2000/svg";

const ICONS = {
  menu: ["M4 7h16", "M4 12h16", "M4 17h10"],
  plus: ["M12 5v14", "M5 12h14"],
  send: ["M12 19V5", "M6 11l6-6 6 6"],
  stop: ["M8 8h8v8H8z"],
  copy: ["M9 9h10v10H9z", "M5 15V5h10"],
  check: ["M5 12.5l4.5 4.5L19 7.5"],
  retry: ["M19 12a7 7 0 1 1-2.2-5.1", "M19 4v4h-4"],
  edit: ["M5 19l1-4L16 5l3 3L9 18z"],
  trash: ["M5 7h14", "M9 7V4.5h6V7", "M7 7l1 12.5h8L17 7"],
  download: ["M12 4v11", "M7 10.5l5 5 5-5", "M5 20h14"],
  settings: ["M4 8h9", "M17 8h3", "M4 16h3", "M11 16h9", "M15 6v4", "M9 14v4"],
  theme: ["M12 4a8 8 0 1 0 0 16z", "M12 4a8 8 0 0 1 0 16"],
  close: ["M6 6l12 12", "M18 6L6 18"],
  chevron: ["M9 6l6 6-6 6"],
  down: ["M12 5v14", "M6 13l6 6 6-6"],
  tool: ["M14 6a4 4 0 0 0 4.6 5.2L11 19l-3-3 7.7-7.6", "M5 5l4 4"],
};

/** An element; `props` are attributes, `on...` listeners, `class`, `text` and `data` (an object). */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") element.className = value;
    else if (name === "text") element.textContent = value;
    else if (name === "value") element.value = value;
    else if (name === "data") Object.assign(element.dataset, value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child || child === 0));
  return element;
}

/** A line drawing of 24 by 24, hidden from screen readers. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  svg.classList.add("icon");
  for (const d of ICONS[name]) {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("d", d);
    svg.append(path);
  }
  return svg;
}

/** A button that shows an icon and says `label`. */
export function iconButton(name, label, onclick, props = {}) {
  return h("button", { type: "button", class: "icon-button", "aria-label": label, title: label, onclick, ...props }, icon(name));
}

export const byId = (id) => document.getElementById(id);

/** Draws the icons that the page asks for with data-icon. */
export function drawIcons(root = document) {
  for (const element of root.querySelectorAll("[data-icon]")) element.prepend(icon(element.dataset.icon));
}

/** Tells screen readers, without moving the focus. */
export function announce(text) {
  byId("status").textContent = text;
}

let noticeTimer = 0;

/** A line at the bottom for some seconds; `action` is {label, run}, for example an undo. */
export function notify(text, action = null) {
  const notice = byId("notice");
  clearTimeout(noticeTimer);
  const hide = () => { notice.hidden = true; };
  notice.replaceChildren(h("span", { text }));
  if (action) notice.append(h("button", { type: "button", class: "link", text: action.label, onclick: () => { hide(); action.run(); } }));
  notice.append(iconButton("close", "Dismiss", hide));
  notice.hidden = false;
  noticeTimer = setTimeout(hide, action ? 12000 : 8000);
}

async function writeClipboard(text) {
  if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text);
  const area = h("textarea", { class: "offscreen", value: text, readonly: true });  // plain http from another machine
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  if (!copied) throw new Error("copying is not allowed here");
}

/** A button that copies what `read()` returns, and says so. */
export function copyButton(read, label = "Copy", props = {}) {
  const button = iconButton("copy", label, async () => {
    try {
      await writeClipboard(read());
    } catch (error) {
      notify(`Could not copy: ${error.message}`);
      return;
    }
    button.replaceChildren(icon("check"));
    announce("Copied");
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  }, props);
  return button;
}

/** Saves `value` as a JSON file. */
export function download(name, value) {
  const url = URL.createObjectURL(new Blob([JSON.stringify(value, null, 2)], { type: "application/json" }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

/** Lets a text area grow with its text (where the browser does not do it by itself). */
export function autosize(area) {
  if (CSS.supports("field-sizing", "content")) return;
  const fit = () => {
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight}px`;
  };
  area.addEventListener("input", fit);
}

const whole = new Intl.NumberFormat("en-US");
export const count = (number) => whole.format(number);

/** 1536 -> "1.5 KiB". */
export function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (number >= 1024 && at < units.length - 1) {
    number /= 1024;
    at += 1;
  }
  return `${at ? number.toFixed(number < 10 ? 1 : 0) : number} ${units[at]}`;
}
