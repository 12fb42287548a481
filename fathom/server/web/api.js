// The server's OpenAI-style API: streamed chat, the list of models, the metrics.

/** What went wrong, with the HTTP status (0: no answer at all) and the server's own words. */
export class ApiError extends Error {
  constructor(status, message, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

const LINE_END = /\r\n|\n|\r/;

/** The data of each server-sent event in a stream of bytes, however the stream is cut; comments are passed over. */
export async function* serverEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (let { value, done } = await reader.read(); !done; { value, done } = await reader.read()) {
      const text = rest + value;
      const cut = text.endsWith("\r") ? text.length - 1 : text.length; // its "\n" may be in the next piece
      const lines = text.slice(0, cut).split(LINE_END);
      rest = lines.pop() + text.slice(cut);
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached. Is it running?");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const text = await response.text().catch(() => "");
  try {
    const { error, detail } = JSON.parse(text);
    return new ApiError(response.status, error?.message ?? JSON.stringify(detail), error?.code);
  } catch {
    return new ApiError(response.status, text.trim().slice(0, 400) || response.statusText || "The server gave no reason.");
  }
}

/** The chunks of a streamed answer. Throws ApiError, also for errors inside the stream and for a stream that breaks off. */
export async function* streamChat(body, key, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST", headers: { "Content-Type": "application/json", ...headers(key) }, body: JSON.stringify(body), signal,
  });
  try {
    for await (const data of serverEvents(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.status ?? 500, chunk.error.message ?? "The answer broke off.", chunk.error.code);
      yield chunk;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError(0, "The connection broke off before the answer was complete.");
  }
  throw new ApiError(0, "The connection broke off before the answer was complete.");
}

/** The models on offer: a list of {id, context} where context may be null. */
export async function listModels(key) {
  const { data } = await (await request("v1/models", { headers: headers(key) })).json();
  return data.map((model) => ({ id: model.id, context: model.max_model_len ?? model.context_length ?? null }));
}

const SAMPLE = /^([A-Za-z_:][\w:]*)(?:\{[^}]*\})? (\S+)/;

/** Prometheus text -> sums by metric name, over all labels. */
export function parseMetrics(text) {
  const sums = new Map();
  for (const line of text.split("\n")) {
    const [, name, value] = SAMPLE.exec(line) ?? [];
    if (name) sums.set(name, (sums.get(name) ?? 0) + Number(value));
  }
  return sums;
}

/** The server's metrics, or null where they are not for us. */
export async function readMetrics(key) {
  try {
    return parseMetrics(await (await request("metrics", { headers: headers(key) })).text());
  } catch {
    return null;
  }
}
