// What stays in the browser: conversations and settings in local storage, the API key in session storage.
//
// A conversation has two entries, its head (title and times, for the list) and its messages, so that two windows never
// overwrite each other's lists. Where storage is forbidden, everything still works until the page is closed.

const HEAD = "fathom.head.";
const BODY = "fathom.body.";
const SETTINGS = "fathom.settings";
const KEY = "fathom.key";

const DEFAULTS = {
  model: "", mode: "high", system: "", temperature: "", top_p: "", max_tokens: "", seed: "", tools: "", offerTools: false,
  prices: "flash-launch", theme: "auto", rememberKey: false,
};

/** A Map that behaves like storage, for where there is none. */
class Memory {
  constructor() {
    this.map = new Map();
  }

  get length() {
    return this.map.size;
  }

  key(at) {
    return [...this.map.keys()][at] ?? null;
  }

  getItem(name) {
    return this.map.get(name) ?? null;
  }

  setItem(name, value) {
    this.map.set(name, value);
  }

  removeItem(name) {
    this.map.delete(name);
  }
}

function usable(kind) {
  try {
    window[kind].getItem(KEY);
    return window[kind];
  } catch {
    return new Memory();
  }
}

const local = usable("localStorage");
const session = usable("sessionStorage");

function read(storage, name, otherwise) {
  try {
    return JSON.parse(storage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

export function newConversation() {
  const now = Date.now();
  return { id: crypto.randomUUID?.() ?? `${now}-${Math.random().toString(36).slice(2)}`, title: "", created: now, updated: now, messages: [],
    spent: null };
}

/** Heads of all conversations, the latest first. */
export function listConversations() {
  const heads = [];
  for (let at = 0; at < local.length; at += 1) {
    const name = local.key(at);
    if (!name.startsWith(HEAD)) continue;
    const head = read(local, name, null);
    if (head && typeof head.title === "string") heads.push({ ...head, id: name.slice(HEAD.length) });
  }
  return heads.sort((a, b) => b.updated - a.updated);
}

/** The conversation, or null where it is gone or unreadable. */
export function loadConversation(id) {
  const head = read(local, HEAD + id, null);
  const body = read(local, BODY + id, null);
  return head && Array.isArray(body?.messages) ? { ...head, id, messages: body.messages, spent: body.spent ?? null } : null;
}

/** Writes the conversation; false where the browser has no room left. */
export function saveConversation({ id, title, created, updated, messages, spent }) {
  try {
    local.setItem(BODY + id, JSON.stringify({ messages, spent }));
    local.setItem(HEAD + id, JSON.stringify({ title, created, updated }));
    return true;
  } catch {
    return false;
  }
}

export function deleteConversation(id) {
  local.removeItem(HEAD + id);
  local.removeItem(BODY + id);
}

/** True if the change that another window made concerns the list. */
export const concernsList = (event) => event.key === null || event.key.startsWith(HEAD);

const text = (value) => (typeof value === "string" ? value : value == null ? "" : JSON.stringify(value));

/** A message of an exported file with everything in its place; null for one that is none. */
function readMessage(message) {
  const content = text(message?.content);
  if (message?.role === "user") return { role: "user", content };
  if (message?.role === "tool") return { role: "tool", tool_call_id: text(message.tool_call_id), content };
  if (message?.role !== "assistant") return null;
  const calls = Array.isArray(message.tool_calls) ? message.tool_calls.filter((call) => typeof call?.function?.name === "string") : [];
  return {
    ...message, content, reasoning_content: text(message.reasoning_content), finish: message.finish ?? "stop", thought: Number(message.thought) || 0,
    tool_calls: calls.map((call) => ({ ...call, id: text(call.id), function: { name: call.function.name, arguments: text(call.function.arguments) } })),
  };
}

/** Conversations out of an exported file; throws an Error that says what is wrong. */
export function readExport(file) {
  const parsed = JSON.parse(file);
  return (Array.isArray(parsed) ? parsed : [parsed]).map((each, at) => {
    const messages = Array.isArray(each?.messages) ? each.messages.map(readMessage) : [null];
    if (messages.includes(null)) throw new Error(`conversation ${at + 1} is not a list of messages`);
    return { ...newConversation(), title: text(each.title), updated: Number(each.updated) || Date.now(), messages };
  });
}

export function loadSettings() {
  return { ...DEFAULTS, ...read(local, SETTINGS, {}) };
}

export function saveSettings(settings) {
  try {
    local.setItem(SETTINGS, JSON.stringify(settings));
  } catch {
    return false;
  }
  return true;
}

export function loadKey() {
  return session.getItem(KEY) ?? local.getItem(KEY) ?? "";
}

/** Keeps the key until the window is closed, or longer with `remember`. */
export function saveKey(key, remember) {
  local.removeItem(KEY);
  session.removeItem(KEY);
  if (key) (remember ? local : session).setItem(KEY, key);
}
