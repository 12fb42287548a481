// The list of conversations: open, rename, export, delete. On a phone it is a drawer.

import { byId, download, h, iconButton, notify } from "./dom.js";
import { deleteConversation, listConversations, loadConversation, readExport, saveConversation } from "./store.js";

const DAY = 24 * 3600 * 1000;
const narrow = matchMedia("(max-width: 52rem)");

/** Under which heading a conversation stands. */
function period(updated) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (updated >= midnight) return "Today";
  if (updated >= midnight - DAY) return "Yesterday";
  return updated >= midnight - 7 * DAY ? "Last seven days" : "Earlier";
}

const fileName = (title) => `${title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60) || "conversation"}.json`;

export class Sidebar {
  constructor(chat) {
    this.chat = chat;
    this.list = byId("conversations");
    byId("menu").addEventListener("click", () => this.toggle());
    byId("shade").addEventListener("click", () => this.close());
    byId("new").addEventListener("click", () => this.startNew());
    byId("export-all").addEventListener("click", () => this.exportAll());
    byId("import").addEventListener("change", (event) => this.importFile(event.target));
    narrow.addEventListener("change", () => this.show(!narrow.matches));
    this.show(!narrow.matches);
  }

  get drawer() {
    return narrow.matches;
  }

  show(open) {
    document.body.classList.toggle("listed", open);
    byId("menu").setAttribute("aria-expanded", String(open));
    byId("sidebar").inert = !open;
    byId("main").inert = open && this.drawer;
    if (open && this.drawer) byId("new").focus();
  }

  toggle() {
    this.show(!document.body.classList.contains("listed"));
  }

  /** Closes the drawer, if it is one and open. True if it did. */
  close() {
    const closes = this.drawer && document.body.classList.contains("listed");
    if (closes) {
      this.show(false);
      byId("menu").focus();
    }
    return closes;
  }

  startNew() {
    this.chat.open(null);
    this.close();
    byId("prompt").focus();
  }

  render() {
    const heads = listConversations();
    const groups = new Map();
    for (const head of heads) groups.set(period(head.updated), [...groups.get(period(head.updated)) ?? [], head]);
    this.list.replaceChildren(...[...groups].map(([name, group]) => h("section", {}, h("h2", { text: name }),
      h("ul", {}, ...group.map((head) => this.entry(head))))));
    byId("no-conversations").hidden = heads.length > 0;
  }

  entry(head) {
    const current = head.id === this.chat.conversation.id;
    const open = h("button", { type: "button", class: "open", "aria-current": current ? "page" : null, title: head.title, onclick: () => {
      this.chat.open(head.id);
      this.close();
    } }, h("span", { text: head.title || "Untitled" }), this.chat.turns.has(head.id) && h("span", { class: "pulse" }));
    const item = h("li", {}, open, h("div", { class: "tools" },
      iconButton("edit", "Rename", () => this.rename(item, head)),
      iconButton("download", "Export", () => download(fileName(head.title), loadConversation(head.id))),
      iconButton("trash", "Delete", () => this.remove(head))));
    return item;
  }

  rename(item, head) {
    const field = h("input", { class: "field", value: head.title, "aria-label": "Title", maxlength: 120 });
    let over = false;
    const end = (keep) => {
      if (over) return;
      over = true;
      const title = field.value.trim();
      if (keep && title) this.change(head.id, (conversation) => { conversation.title = title; });
      this.chat.render();
      this.render();
    };
    field.addEventListener("blur", () => end(true));
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter") end(true);
      if (event.key !== "Escape") return;
      event.stopPropagation();
      end(false);
    });
    item.replaceChildren(field);
    field.select();
  }

  /** Changes a conversation where it lives: on the page, in a running answer, or in storage. */
  change(id, edit) {
    const { conversation, turns } = this.chat;
    const found = conversation.id === id ? conversation : turns.get(id)?.conversation ?? loadConversation(id);
    if (!found) return;
    edit(found);
    this.chat.save(found);
  }

  remove(head) {
    const kept = loadConversation(head.id);
    this.chat.forget(head.id);
    deleteConversation(head.id);
    if (this.chat.conversation.id === head.id) this.chat.open(null);
    this.render();
    notify(`Deleted "${head.title || "Untitled"}".`, kept && { label: "Undo", run: () => {
      this.chat.bringBack(kept);
      this.render();
    } });
  }

  exportAll() {
    download("conversations.json", listConversations().map((head) => loadConversation(head.id)).filter(Boolean));
  }

  async importFile(input) {
    try {
      const conversations = readExport(await input.files[0].text());
      const saved = conversations.filter(saveConversation).length;
      notify(saved === conversations.length ? `Imported: ${saved}` : `The browser's storage is full: ${saved} of ${conversations.length} imported.`);
    } catch (error) {
      notify(`This file cannot be imported: ${error.message}`);
    }
    input.value = "";
    this.render();
  }
}
