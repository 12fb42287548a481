// How a message looks: what the user wrote, what the model thought, answered and called, and what each cost.

import { autosize, copyButton, count, h, icon, iconButton } from "./dom.js";
import { Highlighter } from "./highlight.js";
import { MarkdownView } from "./markdown.js";
import { cost, dollars, tokensOf } from "./prices.js";
import { MODES } from "./turn.js";

const TITLES = {
  0: "No connection", 400: "The server refused this request", 401: "The server asks for an API key", 403: "Not allowed", 404: "Not found",
  413: "Too long", 429: "The server is busy", 500: "The server failed", 503: "The server is not taking requests now",
};

export const seconds = (time) => (time < 10 ? `${time.toFixed(1)} s` : time < 100 ? `${Math.round(time)} s`
  : `${Math.floor(time / 60)} min ${Math.round(time % 60)} s`);

/** A message of the user, with a way to change it. */
export function userMessage(message, actions) {
  const article = h("article", { class: "message user", "aria-label": "You" });
  const show = () => article.replaceChildren(
    h("div", { class: "bubble", text: message.content }),
    h("div", { class: "actions" }, copyButton(() => message.content, "Copy message"), iconButton("edit", "Edit message", edit)));
  const edit = () => {
    const area = h("textarea", { class: "field", rows: 3, "aria-label": "Edit message", value: message.content });
    const send = () => area.value.trim() && actions.edit(message, area.value);
    area.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send();
      } else if (event.key === "Escape") {
        event.stopPropagation();
        show();
      }
    });
    article.replaceChildren(h("div", { class: "editor" }, area, h("div", { class: "row" },
      h("button", { type: "button", class: "button", text: "Cancel", onclick: show }),
      h("button", { type: "button", class: "button primary", text: "Send", onclick: send }))));
    autosize(area);
    area.focus();
  };
  show();
  article.edit = edit;
  return article;
}

function prettyArguments(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

function coloured(text) {
  const highlighter = new Highlighter("json");
  return text.split("\n").flatMap((line) => [...highlighter.line(line, null).nodes, "\n"]).slice(0, -1);
}

/** One tool call: its name and arguments, then its result or a place to write it. */
class CallView {
  constructor() {
    this.name = h("span", { class: "call-name" });
    this.code = h("code");
    this.result = h("div", { class: "call-result" });
    this.element = h("section", { class: "call" }, h("header", {}, icon("tool"), this.name), h("pre", { tabindex: 0 }, this.code), this.result);
  }

  update(call) {
    if (call.function.arguments === this.shown) return;
    this.shown = call.function.arguments;
    this.name.textContent = call.function.name;
    this.element.setAttribute("aria-label", `Call of ${call.function.name}`);
    this.code.replaceChildren(...coloured(prettyArguments(this.shown)));
  }

  answered(text) {
    this.result.replaceChildren(h("span", { class: "label", text: "Result" }), h("pre", { tabindex: 0, text }));
  }

  ask(call, submit) {
    this.area = h("textarea", { class: "field mono", rows: 2, "aria-label": `Result of ${call.function.name}`,
      placeholder: "What did the tool return? Text or JSON" });
    this.area.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit();
    });
    this.result.replaceChildren(this.area);
    autosize(this.area);
  }
}

/** An answer that may still be growing: `update()` draws what came since. */
export class AnswerView {
  constructor(message, results, actions) {
    Object.assign(this, { message, results, actions, calls: [], folded: false });
    this.summary = h("span");
    this.thoughts = h("div", { class: "prose thoughts" });
    this.reasoning = h("details", { class: "reasoning", hidden: true }, h("summary", {}, icon("chevron"), this.summary), this.thoughts);
    this.reasoning.querySelector("summary").addEventListener("click", () => { this.byHand = true; });
    this.waiting = h("div", { class: "waiting", hidden: true }, h("span", { class: "pulse" }), h("span", { text: "Reading" }));
    this.answer = h("div", { class: "prose" });
    this.called = h("div", { class: "calls" });
    this.footer = h("footer");
    this.element = h("article", { class: "message assistant", "aria-label": "Answer" },
      this.reasoning, this.waiting, this.answer, this.called, this.footer);
    this.thoughtsView = new MarkdownView(this.thoughts);
    this.answerView = new MarkdownView(this.answer);
  }

  /** Draws the message; `phase` of a running turn is waiting, thinking or answering, else null. */
  update(phase) {
    const { message } = this;
    this.element.setAttribute("aria-busy", String(phase !== null));
    this.element.classList.toggle("live", phase !== null);
    this.waiting.hidden = phase !== "waiting";
    if (message.reasoning_content) this.updateReasoning(phase);
    this.answerView.update(message.content);
    message.tool_calls.forEach((call, at) => {
      if (!this.calls[at]) {
        this.calls[at] = new CallView();
        this.called.append(this.calls[at].element);
      }
      this.calls[at].update(call);
    });
    while (this.calls.length > message.tool_calls.length) this.calls.pop().element.remove();
  }

  updateReasoning(phase) {
    const { message, reasoning } = this;
    reasoning.hidden = false;
    if (!this.byHand) {
      if (phase === "thinking") reasoning.open = true;
      else if (!this.folded) reasoning.open = false;
    }
    this.folded = phase !== "thinking";
    reasoning.classList.toggle("thinking", phase === "thinking");
    this.summary.textContent = `${phase === "thinking" ? "Thinking" : "Thought"} for ${seconds(message.thought)}`;
    if (reasoning.open || phase === null) this.thoughtsView.update(message.reasoning_content);
    else reasoning.addEventListener("toggle", () => this.thoughtsView.update(message.reasoning_content), { once: true });
  }

  /** Draws what only a finished answer has: results, problems, buttons, costs. `last`: nothing follows it. */
  finish(last, table) {
    const { message, actions } = this;
    const { error } = message;
    const cut = message.stopped || message.finish === "length" || (!message.finish && !error);
    const parts = [];
    this.showResults(last);
    if (error) parts.push(this.problem(error, last));
    else if (cut) parts.push(this.cutShort(last));
    parts.push(h("div", { class: "actions" },
      message.content && copyButton(() => message.content, "Copy answer"),
      !error && iconButton("retry", "Answer again", () => actions.retry(message)),
      h("span", { class: "facts" }, ...this.facts(table))));
    this.footer.replaceChildren(...parts);
  }

  showResults(last) {
    const { message, results, actions } = this;
    const open = message.tool_calls.filter((call) => !results.has(call.id));
    this.called.querySelector(".row")?.remove();
    const submit = () => {
      actions.results(message, message.tool_calls.map((call, at) => results.get(call.id) ?? this.calls[at].area.value));
    };
    message.tool_calls.forEach((call, at) => {
      if (results.has(call.id)) this.calls[at].answered(results.get(call.id));
      else if (last) this.calls[at].ask(call, submit);
    });
    if (last && open.length) {
      this.called.append(h("div", { class: "row" }, h("button", {
        type: "button", class: "button primary", text: open.length > 1 ? "Send results" : "Send result", onclick: submit })));
    }
  }

  problem(error, last) {
    const title = TITLES[error.status] ?? `The server answered ${error.status}`;
    const unauthorised = error.status === 401;
    return h("div", { class: "problem", role: "alert" }, h("strong", { text: title }), h("p", { text: error.message }),
      last && h("div", { class: "row" },
        unauthorised && h("button", { type: "button", class: "button primary", text: "Enter API key", onclick: () => this.actions.askKey(this.message) }),
        h("button", { type: "button", class: `button ${unauthorised ? "" : "primary"}`, text: "Retry",
          onclick: () => this.actions.retry(this.message) })));
  }

  cutShort(last) {
    const { message } = this;
    const why = message.stopped ? "Stopped." : message.finish === "length" ? "Stopped at the token limit." : "Interrupted.";
    const going = last && (message.content || message.reasoning_content);
    return h("p", { class: "cut" }, why, going && h("button", {
      type: "button", class: "link", text: "Continue", onclick: () => this.actions.goOn(message) }));
  }

  facts(table) {
    const { message } = this;
    const facts = [];
    if (message.mode in MODES) facts.push(MODES[message.mode].name);
    if (message.usage) {
      const tokens = tokensOf(message.usage);
      facts.push(`${count(tokens.output)} tokens`);
      if (message.seconds > 0.2) facts.push(`${(tokens.output / message.seconds).toFixed(1)} / s`);
      facts.push(dollars(cost(tokens, table)));
    }
    return facts.map((text) => h("span", { text }));
  }
}
