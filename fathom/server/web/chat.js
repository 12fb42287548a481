// The open conversation: its messages on the page, its running answer, and everything one can do to it.

import { announce, byId, h, notify } from "./dom.js";
import { AnswerView, userMessage } from "./message.js";
import { addTokens, NOTHING, priceTable, tokensOf } from "./prices.js";
import { loadConversation, newConversation, saveConversation } from "./store.js";
import { newAnswer, requestBody, Turn } from "./turn.js";

const SAVE_EVERY = 1500; // ms, while an answer streams in
const NEAR = 64; // px from the end within which the page follows the answer

export class Chat {
  /** `settings` is read at every request; `hooks`: changed(), askKey(then), problem(text), key(). */
  constructor(settings, hooks) {
    this.settings = settings;
    this.hooks = hooks;
    this.turns = new Map(); // running, by conversation id
    this.gone = new Set(); // ids of deleted conversations
    this.thread = byId("thread");
    this.scroller = byId("scroll");
    this.following = true;
    this.scroller.addEventListener("scroll", () => this.scrolled(), { passive: true });
    byId("to-end").addEventListener("click", () => this.toEnd());
    this.actions = {
      edit: (message, text) => this.edit(message, text),
      retry: (message) => this.retry(message),
      results: (message, results) => this.giveResults(message, results),
      goOn: (message) => this.goOn(message),
      askKey: (message) => this.hooks.askKey(() => this.retry(message)),
    };
  }

  get turn() {
    return this.turns.get(this.conversation.id) ?? null;
  }

  /** Opens a stored conversation (a running one keeps running), or a new one. */
  open(id) {
    this.conversation = this.turns.get(id)?.conversation ?? (id ? loadConversation(id) : null) ?? newConversation();
    this.showAddress();
    this.render();
    this.toEnd();
    this.hooks.changed();
  }

  /** The address names the conversation, so that a reload opens it again. */
  showAddress() {
    const { id, messages } = this.conversation;
    history.replaceState(null, "", messages.length ? `#${id}` : location.pathname + location.search);
  }

  // ---- what one can do

  send(text) {
    const { messages } = this.conversation;
    const waiting = this.openCall();
    if (waiting) {
      notify("The answer called a tool. Give the result above first, or answer again.");
      waiting.focus();
      return false;
    }
    if (!this.checked()) return false;
    messages.push({ role: "user", content: text });
    if (!this.conversation.title) this.conversation.title = titleOf(text);
    this.answer();
    return true;
  }

  edit(message, text) {
    if (!this.checked()) return;
    this.cutFrom(message, { role: "user", content: text });
    this.answer();
  }

  retry(message) {
    if (!this.checked()) return;
    this.cutFrom(message);
    this.answer();
  }

  giveResults(message, results) {
    if (!this.checked()) return;
    message.tool_calls.forEach((call, at) => {
      if (!this.results().has(call.id)) this.conversation.messages.push({ role: "tool", tool_call_id: call.id, content: results[at] });
    });
    this.answer();
  }

  /** Lets the model continue an answer that was cut short. */
  goOn(message) {
    if (!this.checked()) return;
    const before = this.conversation.messages.slice(0, this.conversation.messages.indexOf(message));
    Object.assign(message, { stopped: false, finish: null });
    this.start(message, requestBody(before, this.settings, message));
  }

  stop() {
    this.turn?.stop();
  }

  /** The user's last message becomes editable. */
  editLast() {
    this.thread.querySelectorAll(".message.user").item(this.thread.querySelectorAll(".message.user").length - 1)?.edit?.();
  }

  /** Whether a request can be made now; says why not. */
  checked() {
    if (this.turn) return false;
    try {
      requestBody([], this.settings);
    } catch (error) {
      this.hooks.problem(`Tools: ${error.message}`);
      return false;
    }
    return true;
  }

  /** Drops the message and all after it, puts `instead` there, and offers to take that back. */
  cutFrom(message, ...instead) {
    const { conversation } = this;
    const before = [...conversation.messages];
    const at = before.indexOf(message);
    conversation.messages.splice(at, Infinity, ...instead);
    if (message.error && !message.content) return;
    notify(at + 1 < before.length ? "The later messages were removed." : "The earlier answer was removed.", {
      label: "Undo",
      run: () => {
        this.turns.get(conversation.id)?.stop();
        conversation.messages = before;
        this.save(conversation);
        if (this.conversation === conversation) this.render();
      },
    });
  }

  // ---- a running answer

  answer() {
    const body = requestBody(this.conversation.messages, this.settings);
    const message = newAnswer(this.settings);
    this.conversation.messages.push(message);
    this.start(message, body);
  }

  async start(message, body) {
    const { conversation } = this;
    const turn = new Turn(conversation, message, () => this.schedule(turn));
    const usageBefore = message.usage;
    let saved = performance.now();
    turn.tick = () => {
      if (performance.now() - saved < SAVE_EVERY) return;
      saved = performance.now();
      this.save(conversation);
    };
    this.turns.set(conversation.id, turn);
    conversation.updated = Date.now();
    delete message.error;
    this.save(conversation);
    this.showAddress();
    this.render();
    this.toEnd();
    this.hooks.changed();
    announce("Waiting for the answer");
    await turn.run(body, this.hooks.key());
    this.turns.delete(conversation.id);
    if (message.usage !== usageBefore) conversation.spent = addTokens(conversation.spent ?? NOTHING, tokensOf(message.usage));
    if (conversation.messages.includes(message)) this.save(conversation);
    if (this.conversation === conversation) {
      cancelAnimationFrame(this.frame);
      this.frame = 0;
      this.render();
      this.follow();
      announce(message.error ? `Error: ${message.error.message}` : message.stopped ? "Stopped" : "The answer is complete");
    }
    this.hooks.changed();
  }

  /** Draws at most once a frame, whatever comes in. */
  schedule(turn) {
    turn.tick();
    if (this.frame || this.conversation !== turn.conversation) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      if (this.conversation !== turn.conversation) return;
      this.views.get(turn.message)?.update(turn.phase);
      this.follow();
    });
  }

  /** A deleted conversation is not saved any more, until it is brought back. */
  forget(id) {
    this.turns.get(id)?.stop();
    this.gone.add(id);
  }

  bringBack(conversation) {
    this.gone.delete(conversation.id);
    this.save(conversation);
  }

  /** The page goes away: what came so far is kept, and that the connections then break is no news. */
  leave() {
    for (const { conversation } of this.turns.values()) this.save(conversation);
    this.left = true;
  }

  save(conversation) {
    if (this.left || this.gone.has(conversation.id) || saveConversation(conversation)) return;
    if (!this.warned) notify("The browser's storage is full: this conversation is not saved. Export or delete some.");
    this.warned = true;
  }

  // ---- the page

  results() {
    return new Map(this.conversation.messages.filter((each) => each.role === "tool").map((each) => [each.tool_call_id, each.content]));
  }

  openCall() {
    return this.thread.querySelector(".call textarea");
  }

  /** Draws what is missing; views of messages that are still there stay as they are. */
  render() {
    const { messages } = this.conversation;
    const old = this.drawn === this.conversation ? this.views : new Map();
    const shown = messages.filter((message) => message.role !== "tool");
    const results = this.results();
    const table = priceTable(this.settings.prices);
    this.views = new Map();
    for (const message of shown) {
      const view = old.get(message) ?? (message.role === "user" ? { element: userMessage(message, this.actions) }
        : new AnswerView(message, results, this.actions));
      this.views.set(message, view);
      if (message.role === "user") continue;
      view.results = results;
      const live = this.turn?.message === message;
      view.update(live ? this.turn.phase : null);
      if (live) view.footer.replaceChildren();
      else view.finish(message === messages.at(-1), table);
    }
    this.drawn = this.conversation;
    this.place([...this.views.values()].map((view) => view.element));
    byId("welcome").hidden = shown.length > 0;
    byId("title").textContent = this.conversation.title || "New conversation";
    document.title = this.conversation.title ? `${this.conversation.title} · Fathom` : "Fathom";
  }

  /** Makes the elements the thread's children without touching those in place, so that focus and selection stay. */
  place(elements) {
    elements.forEach((element, at) => {
      if (this.thread.children[at] !== element) this.thread.insertBefore(element, this.thread.children[at] ?? null);
    });
    while (this.thread.children.length > elements.length) this.thread.lastChild.remove();
  }

  distance() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    return scrollHeight - scrollTop - clientHeight;
  }

  scrolled() {
    const { scrollTop } = this.scroller;
    if (this.distance() < NEAR) this.following = true;
    else if (scrollTop < this.lastTop) this.following = false;
    this.lastTop = scrollTop;
    byId("to-end").hidden = this.distance() < 4 * NEAR;
  }

  follow() {
    if (this.following) this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  toEnd() {
    this.following = true;
    this.follow();
  }
}

function titleOf(text) {
  const line = text.trim().split("\n", 1)[0];
  return line.length > 60 ? `${line.slice(0, 57).trimEnd()}...` : line;
}
