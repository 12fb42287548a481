// One answer: the request that asks for it, and the message that grows while it streams in.

import { ApiError, streamChat } from "./api.js";

export const MODES = {
  off: { name: "Non-think", fields: { thinking: { type: "disabled" } } },
  high: { name: "High", fields: { thinking: { type: "enabled" }, reasoning_effort: "high" } },
  max: { name: "Max", fields: { thinking: { type: "enabled" }, reasoning_effort: "max" } },
};

/** The tool definitions in `text`; [] for an empty one. Throws an Error that says what is wrong. */
export function readTools(text) {
  if (text.trim() === "") return [];
  const parsed = JSON.parse(text);
  const tools = Array.isArray(parsed) ? parsed : parsed.tools ?? [parsed];
  if (!Array.isArray(tools)) throw new Error("a list of tools is needed");
  tools.forEach((tool, at) => {
    if (tool?.type !== "function" || typeof tool.function?.name !== "string") {
      throw new Error(`tool ${at + 1} is not {"type": "function", "function": {"name": ...}}`);
    }
  });
  return tools;
}

/** The messages as the API wants them: no failed answers, no calls that nobody answered. */
function sent(messages, withReasoning) {
  const answered = new Set(messages.filter((each) => each.role === "tool").map((each) => each.tool_call_id));
  const result = [];
  for (const message of messages) {
    if (message.role !== "assistant") {
      const { role, content, tool_call_id } = message;
      result.push(role === "tool" ? { role, tool_call_id, content } : { role, content });
      continue;
    }
    const calls = message.tool_calls ?? [];
    const complete = calls.length > 0 && calls.every((call) => answered.has(call.id));
    if (!complete && !message.content && (message.error || message.stopped || calls.length)) continue;
    const turn = { role: "assistant", content: message.content };
    if (withReasoning) turn.reasoning_content = message.reasoning_content;
    if (complete) turn.tool_calls = calls;
    result.push(turn);
  }
  return result;
}

/** The body of the request for the next answer. Settings that are left empty are left to the server. */
export function requestBody(messages, settings, goOn = null) {
  const tools = settings.offerTools ? readTools(settings.tools) : [];
  const withReasoning = tools.length > 0 || messages.some((each) => each.role === "tool");
  const body = { model: settings.model, messages: sent(messages, withReasoning), stream: true, stream_options: { include_usage: true } };
  if (settings.system.trim()) body.messages.unshift({ role: "system", content: settings.system });
  if (goOn) {
    const { content, reasoning_content } = goOn;
    body.messages.push({ role: "assistant", content, ...(reasoning_content && { reasoning_content }), prefix: true });
  }
  Object.assign(body, MODES[settings.mode].fields);
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    if (String(settings[name]).trim() !== "") body[name] = Number(settings[name]);
  }
  if (tools.length) body.tools = tools;
  return body;
}

/** An empty answer. */
export function newAnswer(settings) {
  return {
    role: "assistant", content: "", reasoning_content: "", tool_calls: [], finish: null, usage: null, model: settings.model,
    mode: settings.mode, thought: 0, seconds: 0,
  };
}

/** Takes one piece of a streamed answer into the message. */
function absorb(message, delta) {
  message.reasoning_content += delta.reasoning_content ?? "";
  message.content += delta.content ?? "";
  for (const piece of delta.tool_calls ?? []) {
    const call = message.tool_calls[piece.index] ??= { id: "", type: "function", function: { name: "", arguments: "" } };
    call.id = piece.id ?? call.id;
    call.function.name += piece.function?.name ?? "";
    call.function.arguments += piece.function?.arguments ?? "";
  }
}

/** A request that runs. `changed()` is called after every piece, `run()` ends when the answer does. */
export class Turn {
  constructor(conversation, message, changed) {
    this.conversation = conversation;
    this.message = message;
    this.changed = changed;
    this.abort = new AbortController();
  }

  get phase() {
    const { content, reasoning_content, tool_calls } = this.message;
    if (content || tool_calls.length) return "answering";
    return reasoning_content ? "thinking" : "waiting";
  }

  stop() {
    this.abort.abort();
  }

  async run(body, key) {
    const { message } = this;
    const before = { thought: message.thought, seconds: message.seconds };
    let first = 0;
    try {
      for await (const chunk of streamChat(body, key, this.abort.signal)) {
        const [choice] = chunk.choices ?? [];
        const now = performance.now();
        if (choice) {
          const { delta = {}, finish_reason } = choice;
          if (!first && (delta.content || delta.reasoning_content || delta.tool_calls)) first = now;
          absorb(message, delta);
          if (this.phase === "thinking") message.thought = before.thought + (now - first) / 1000;
          message.finish = finish_reason ?? message.finish;
        }
        message.usage = chunk.usage ?? message.usage;
        if (first) message.seconds = before.seconds + (now - first) / 1000;
        this.changed();
      }
    } catch (error) {
      this.failed(error);
    }
  }

  failed(error) {
    const { message } = this;
    if (error.name === "AbortError") message.stopped = true;
    else if (error instanceof ApiError) message.error = { status: error.status, message: error.message };
    else throw error;
    message.tool_calls = []; // their arguments may be cut
  }
}
