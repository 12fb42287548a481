// The line under the composer and its panel: context used, tokens read, written and cached, and what DeepSeek would have charged.

import { readMetrics } from "./api.js";
import { byId, bytes, count, h } from "./dom.js";
import { addTokens, cost, dollars, NOTHING, PRICES, priceTable, tokensOf } from "./prices.js";

/** Tokens of the last answer, those of the whole conversation, and how many the context holds now. */
export function conversationTokens(conversation) {
  const answers = conversation.messages.filter((message) => message.usage);
  const last = answers.at(-1)?.usage ?? null;
  const sum = answers.reduce((tokens, message) => addTokens(tokens, tokensOf(message.usage)), NOTHING);
  return { last: last ? tokensOf(last) : NOTHING, all: conversation.spent ?? sum, context: last ? last.prompt_tokens + last.completion_tokens : 0 };
}

const percent = (share) => (share > 0 && share < 0.001 ? "< 0.1%" : `${(100 * share).toFixed(share < 0.1 ? 1 : 0)}%`);

function row(name, tokens, table) {
  const written = h("td", { text: count(tokens.output) });
  if (tokens.reasoning) written.title = `${count(tokens.reasoning)} of them reasoning`;
  return h("tr", { data: { row: name.toLowerCase() } }, h("th", { scope: "row", text: name }), h("td", { text: count(tokens.hit) }),
    h("td", { text: count(tokens.miss) }), written, h("td", { text: dollars(cost(tokens, table)) }));
}

/** What a server's metrics say about its caches: name, metric, how to show it. Those that it does not have are left out. */
const CACHE_FACTS = [
  ["Cache in use", "fathom:kv_cache_usage_perc", percent],
  ["Kept for reuse", "fathom:prefix_cache_usage_perc", percent],
  ["Window states", "fathom:state_bytes", bytes],
  ["Prefixes on disk", "fathom:kv_disk_bytes", bytes],
];

export class Meter {
  constructor(settings, saveSettings, key) {
    this.settings = settings;
    this.key = key;
    this.details = byId("meter");
    const select = byId("prices");
    for (const group of new Set(PRICES.map((table) => table.group))) {
      select.append(h("optgroup", { label: group }, ...PRICES.filter((table) => table.group === group).map((table) =>
        h("option", { value: table.id, text: `${table.group}, ${table.name} (from ${table.from})` }))));
    }
    select.value = priceTable(settings.prices).id;
    select.addEventListener("change", () => {
      settings.prices = select.value;
      saveSettings();
    });
    this.details.addEventListener("toggle", () => this.details.open && this.readCache());
  }

  /** Shows the numbers of the conversation in a context of `limit` tokens (null: unknown). */
  update(conversation, limit) {
    const table = priceTable(this.settings.prices);
    const { last, all, context } = conversationTokens(conversation);
    const share = limit ? Math.min(1, context / limit) : 0;
    byId("meter-fill").style.width = `${100 * share}%`;
    byId("meter-bar").hidden = !limit;
    byId("meter-context").textContent = limit ? `${percent(share)} of context` : `${count(context)} tokens in context`;
    byId("meter-tokens").textContent = `${count(last.hit)} cached · ${count(last.miss)} new · ${count(last.output)} written`;
    byId("meter-cost").textContent = dollars(cost(all, table));
    byId("meter-rows").replaceChildren(row("Last answer", last, table), row("Conversation", all, table));
    byId("meter-full").textContent = limit ? `${count(context)} of ${count(limit)} tokens` : `${count(context)} tokens`;
    const [hit, miss, output] = table.rates;
    byId("meter-rates").textContent = `US$ for a million tokens: ${hit} cached, ${miss} new, ${output} written.`;
    if (this.details.open) this.readCache();
  }

  /** Asks the server what its caches hold; shows nothing where it does not tell. */
  async readCache() {
    const metrics = await readMetrics(this.key());
    const facts = CACHE_FACTS.filter(([, metric]) => metrics?.has(metric));
    byId("meter-cache").replaceChildren(...facts.flatMap(([name, metric, show]) =>
      [h("dt", { text: name }), h("dd", { text: show(metrics.get(metric)) })]));
    byId("meter-cache").hidden = facts.length === 0;
  }
}
