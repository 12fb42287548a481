// What DeepSeek charged for its own service, in US$ for a million tokens. A model of your own costs nothing.

/** [input from the cache, other input, output] by table; `from` is the day since when. */
export const PRICES = [
  { id: "flash-launch", group: "Flash", name: "launch", from: "2026-04-24", rates: [0.028, 0.14, 0.28] },
  { id: "flash-april", group: "Flash", name: "cache at a tenth", from: "2026-04-26", rates: [0.0028, 0.14, 0.28] },
  { id: "flash-august", group: "Flash", name: "off-peak", from: "2026-08-16", rates: [0.007, 0.22, 0.66] },
  { id: "flash-august-peak", group: "Flash", name: "peak", from: "2026-08-16", rates: [0.014, 0.44, 1.32] },
  { id: "flash-now", group: "V4.1 Flash", name: "off-peak", from: "2026-09-10", rates: [0.003, 0.15, 0.6] },
  { id: "flash-now-peak", group: "V4.1 Flash", name: "peak", from: "2026-09-10", rates: [0.006, 0.3, 1.2] },
  { id: "pro-launch", group: "Pro", name: "launch", from: "2026-04-24", rates: [0.145, 1.74, 3.48] },
  { id: "pro-april", group: "Pro", name: "three quarters off", from: "2026-04-26", rates: [0.003625, 0.435, 0.87] },
  { id: "pro-now", group: "Pro", name: "off-peak", from: "2026-08-16", rates: [0.022, 0.66, 1.98] },
  { id: "pro-now-peak", group: "Pro", name: "peak", from: "2026-08-16", rates: [0.044, 1.32, 3.96] },
];

export const priceTable = (id) => PRICES.find((table) => table.id === id) ?? PRICES[0];

/** Tokens that were counted: input from the cache, other input, output, and the part of the output that was reasoning. */
export const NOTHING = Object.freeze({ hit: 0, miss: 0, output: 0, reasoning: 0 });

/** An API answer's `usage` in our terms. */
export function tokensOf(usage) {
  const hit = usage.prompt_cache_hit_tokens ?? usage.prompt_tokens_details?.cached_tokens ?? 0;
  return {
    hit, miss: usage.prompt_cache_miss_tokens ?? usage.prompt_tokens - hit, output: usage.completion_tokens,
    reasoning: usage.completion_tokens_details?.reasoning_tokens ?? 0,
  };
}

export function addTokens(a, b) {
  return { hit: a.hit + b.hit, miss: a.miss + b.miss, output: a.output + b.output, reasoning: a.reasoning + b.reasoning };
}

/** US$ for the tokens by the table. */
export function cost(tokens, table) {
  const [hit, miss, output] = table.rates;
  return (tokens.hit * hit + tokens.miss * miss + tokens.output * output) / 1e6;
}

/** Money with three digits that say something: $0.0000824, $0.0314, $1.52. */
export function dollars(amount) {
  if (amount === 0) return "$0";
  const digits = amount >= 1 ? 2 : Math.min(9, 2 - Math.floor(Math.log10(amount)));
  return `$${amount.toFixed(digits)}`;
}
