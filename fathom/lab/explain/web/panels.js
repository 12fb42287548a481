// What each step shows: a title, what it is in one or two sentences, where the report says it, the picture.
//
// A panel is a function of (story, layer, at): `at` counts from the first token whose journey is told. It returns
// {title, about, source, formula, figure, heat, legend}; `heat` maps places in the text to 0..1.

const streamName = (at) => `stream ${at + 1}`;

function tokenName(story, place) {
  return h("span", { class: "token-name", text: visible(story.texts[story.tokens[place]]) });
}

function idName(story, id) {
  return h("span", { class: "token-name", text: visible(story.texts[id]) });
}

function tokenPanel(story, _, at) {
  const place = story.first + at;
  const id = story.tokens[place];
  const { config } = story;
  return {
    title: "A token becomes a vector",
    about: `The text is cut into tokens, each a number. The number picks a row of ${config.hidden_size} values from the embedding table; that row, copied ` +
      `${config.hc_mult} times, is what the layers will change: the residual streams.`,
    source: "Report 2.2", formula: `X₀ = (e, …, e),  e = E[${id}]`,
    figure: [h("dl", { class: "facts" },
      h("dt", { text: "Token" }), h("dd", {}, tokenName(story, place)), h("dt", { text: "Id" }), h("dd", { text: `${id} of ${config.vocab_size}` }),
      h("dt", { text: "Position" }), h("dd", { text: `${place} (from 0)` })),
    bars(story.layers[0].connections[0].rms[at].map((value, stream) => ({ name: streamName(stream), value })), { label: "Size of each stream (root mean square)" })],
  };
}

function streamsPanel(story, layer, at, which) {
  const { rms, pre, post, res } = layer.connections[which];
  const sublayer = which ? "the experts" : "attention";
  const N = story.config.hc_mult;
  return {
    title: `The streams around ${sublayer}`,
    about: `The input of ${sublayer} is a weighted sum of the ${N} streams (read). Its output is added to each with its own weight (write), while the streams mix by a ` +
      "matrix whose rows and columns sum to 1, so that depth cannot make them grow.",
    source: "Report 2.2, eq. 1-8 (manifold-constrained hyper-connections)",
    formula: "x = Σₙ readₙ Xₙ    X′ₖ = writeₖ · F(x) + Σⱼ mix[j,k] Xⱼ",
    figure: [h("div", { class: "pair" },
      h("div", {},
        bars(pre[at].map((value, stream) => ({ name: streamName(stream), value })), { most: 1, label: "Read (pre, 0 to 1)" }),
        bars(post[at].map((value, stream) => ({ name: streamName(stream), value })), { most: 2, label: "Write (post, 0 to 2)" }),
        bars(rms[at].map((value, stream) => ({ name: streamName(stream), value })), { label: "Size before (root mean square)" })),
      matrix(res[at], { label: "Mix (res): from row to column", rowName: streamName, columnName: (column) => String(column + 1) }))],
  };
}

function windowPanel(story, layer, at) {
  const place = story.first + at;
  const values = layer.window[at];
  const oldest = place + 1 - values.length;
  const most = Math.max(...values);
  const order = values.map((_, back) => back).sort((a, b) => values[b] - values[a]).slice(0, 12);
  return {
    title: "The window: recent tokens, one by one",
    about: `Of the last ${story.config.sliding_window} tokens, itself included, each keeps one vector that is key and value at once, for all ` +
      `${story.config.num_attention_heads} heads. ${layer.ratio ? "It shares one softmax with the compressed entries of the next step." : "This layer reads nothing else."}`,
    source: "Report 2.3.3, eq. 18-19", formula: "scoreₛ = q · kₛ / √c",
    figure: [bars(order.map((back) => ({ name: tokenName(story, oldest + back), value: values[back],
      note: oldest + back === place ? "itself" : `${place - oldest - back} back` })),
    { show: percent, label: `Attention, mean of the heads: the ${order.length} largest of ${values.length}` })],
    heat: new Map(values.map((value, back) => [oldest + back, value / most])),
    legend: "Shaded: how much attention each token of the window gets.",
  };
}

/** Places [from, to) whose tokens entry `slot` was made of. */
function covered(layer, slot) {
  const from = layer.kind === "csa" ? Math.max(0, (slot - 1) * layer.ratio) : slot * layer.ratio;
  return [from, (slot + 1) * layer.ratio];
}

function entryText(story, layer, slot) {
  const [from, to] = covered(layer, slot);
  return story.tokens.slice(from, to).map((id) => plain(story.texts[id])).join("").replaceAll("\n", "⏎");
}

function entriesAbout(story, layer, count, picked) {
  const { ratio } = layer;
  if (layer.kind === "hca") {
    return `Every ${ratio} tokens are pooled into one entry, without overlap (heavily compressed attention). Entries are so few that all ${count} ` +
      "finished ones are read.";
  }
  const chosen = picked < count ? `the best ${picked} of ${count} are read` : `all ${count} are read, as there are no more than it may pick (${story.config.index_topk})`;
  return `Every ${ratio} tokens become one entry, which also pools the ${ratio} before (compressed sparse attention). The lightning indexer scores each finished ` +
    `entry with a few cheap heads; here ${chosen}.`;
}

function entriesPanel(story, layer, at, _, ui) {
  const mass = layer.entries[at];
  const csa = layer.kind === "csa";
  const picked = new Set(csa ? layer.picked[at] : mass.keys());
  const figure = [];
  if (mass.length === 0) {
    figure.push(h("p", { class: "empty", text: `No block of ${layer.ratio} tokens is finished yet at this token. Go to a later one.` }));
  } else {
    figure.push(columns(csa ? layer.scores[at] : mass, picked, ui.focusEntry), h("p", { class: "caption", text:
      csa ? "The indexer's scores, oldest entry first; strong colour: picked. The table below is ordered by score." : "Attention by entry, oldest first" }));
    figure.push(entryTable(story, layer, at, picked, ui));
  }
  const heat = new Map();
  const most = Math.max(...mass, 0) || 1;
  const shown = ui.entry !== null && ui.entry < mass.length ? [ui.entry] : [...picked];
  for (const slot of shown) {
    const [from, to] = covered(layer, slot);
    for (let place = from; place < to; place += 1) {
      heat.set(place, Math.max(heat.get(place) ?? 0, ui.entry === slot ? 1 : Math.max(0.12, mass[slot] / most)));
    }
  }
  return {
    title: csa ? "Compressed entries, and which the indexer picks" : "Heavily compressed entries", about: entriesAbout(story, layer, mass.length, picked.size),
    source: csa ? "Report 2.3.1, eq. 9-17" : "Report 2.3.2, eq. 20-26",
    formula: csa ? "Iₛ = Σₕ wₕ · ReLU(qₕ · kₛ)    pick = top-k(I)" : "entryᵢ = Σⱼ softmaxⱼ(Zⱼ + Bⱼ) ⊙ Cⱼ", figure, heat,
    legend: ui.entry === null || ui.entry >= mass.length ? "Shaded: the tokens behind the entries that are read, by the attention these get." : `Shaded: the tokens behind entry ${ui.entry}.`,
  };
}

function entryTable(story, layer, at, picked, ui) {
  const mass = layer.entries[at];
  const scores = layer.scores?.[at];
  const slots = [...mass.keys()];
  if (scores) slots.sort((a, b) => Number(picked.has(b)) - Number(picked.has(a)) || scores[b] - scores[a] || a - b);
  return h("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": "Entries" }, h("table", { class: "entries" },
    h("thead", {}, h("tr", {}, h("th", { scope: "col", text: "Entry" }), h("th", { scope: "col", class: "words", text: "Made of" }),
      scores && h("th", { scope: "col", text: "Score" }), scores && h("th", { scope: "col", text: "Picked" }), h("th", { scope: "col", text: "Attention" }))),
    h("tbody", {}, slots.map((slot) => h("tr", { class: [picked.has(slot) && "picked", slot === ui.entry && "focused"].filter(Boolean).join(" ") },
      h("th", { scope: "row" }, h("button", { type: "button", "data-entry": slot, "aria-pressed": String(slot === ui.entry), text: String(slot),
        "aria-label": `Show the tokens of entry ${slot}`, onclick: () => ui.focusEntry(slot) })),
      h("td", { class: "words", text: entryText(story, layer, slot) }), scores && h("td", { text: number(scores[slot]) }),
      scores && h("td", { text: picked.has(slot) ? "yes" : "" }), h("td", { text: picked.has(slot) ? percent(mass[slot]) : "" }))))));
}

function sharePanel(story, layer, at) {
  const heads = layer.share[at];
  const parts = layer.ratio ? ["window", "entries", "sink"] : ["window", "sink"];
  const of = (head) => (layer.ratio ? head : [head[0], head[2]]);
  const mean = of(heads[0]).map((_, part) => heads.reduce((total, head) => total + of(head)[part], 0) / heads.length);
  const row = (name, shares) => h("tr", {}, h("th", { scope: "row", text: name }), h("td", { class: "stack" }, shares.map((share, part) =>
    h("span", { class: `part ${parts[part]}`, style: { "--share": String(share) } }))), shares.map((share) => h("td", { class: "digits", text: percent(share) })));
  return {
    title: "One softmax for all of it",
    about: `All that a head may read competes in one softmax, together with a learned sink that takes its share and gives nothing. Each head's output is then turned back by the ` +
      "token's own position, so that only distances count.",
    source: "Report 2.3.3, eq. 27", formula: "pₛ = exp(zₛ) / (Σₛ′ exp(zₛ′) + exp(sink))",
    figure: [h("table", { class: "shares" }, h("caption", { text: "Where each head looks" }), h("thead", {}, h("tr", {}, h("td"), h("td"),
      parts.map((part) => h("th", { scope: "col" }, h("span", { class: `swatch ${part}` }), part)))),
    h("tbody", {}, heads.map((head, index) => row(`head ${index + 1}`, of(head)))), h("tfoot", {}, row("mean", mean)))],
  };
}

function expertsPanel(story, layer, at) {
  const weights = new Map(layer.experts[at].map((expert, rank) => [expert, layer.weights[at][rank]]));
  const { config } = story;
  const how = layer.hash ? "In this layer a fixed table of the token's id says which; the router only weighs them."
    : `The ${config.num_experts_per_tok} with the best affinity, plus a bias that evens out the load, are chosen; the bias does not weigh.`;
  const all = layer.affinity[at].map((value, expert) => ({ expert, value })).filter(({ expert }, _, list) => list.length <= 64 || weights.has(expert));
  return {
    title: "Experts: which networks this token visits",
    about: `${config.num_experts_per_tok} of ${config.n_routed_experts} small networks read the token, and one shared expert always does. ${how}`,
    source: layer.hash ? "Report 2.1 (hash routing)" : "Report 2.1 (DeepSeekMoE)", formula: "affinityₑ = √softplus(x · rₑ)    weightₑ = scale · affinityₑ / Σ chosen",
    figure: [bars(all.map(({ expert, value }) => ({ name: `expert ${expert}`, value, picked: weights.has(expert),
      note: weights.has(expert) ? `weight ${number(weights.get(expert))}` : layer.bias ? `bias ${number(layer.bias[expert])}` : "" })),
    { label: "Affinity; strong colour: chosen" }), h("p", { class: "caption", text: `The weights sum to ${number(config.routed_scaling_factor)}, the scale.` })],
  };
}

function afterPanel(story, layer, at, index) {
  return {
    title: "After the layer",
    about: "The streams now carry what this layer added. To see what they already know, the model's own head is applied here, as if the remaining layers did nothing.",
    source: "An observation, not part of the model", formula: "softmax(head(norm(collapse(X))))",
    figure: [bars(layer.early[at].map(([id, value]) => ({ name: idName(story, id), value })), { most: 1, show: percent, label: `Next token, if it stopped after layer ${index}` }),
      bars(layer.after[at].map((value, stream) => ({ name: streamName(stream), value })), { label: "Size of each stream (root mean square)" })],
  };
}

function predictionPanel(story, _, at) {
  const place = story.first + at;
  const known = story.next[at];
  const follows = known && story.tokens[place + 1];
  return {
    title: "The next token",
    about: "The streams are summed up with weights of their own, normalised, and compared with every token of the vocabulary; a softmax makes probabilities of it.",
    source: "Report 2.2 and released code (the head that collapses the streams)", formula: "p = softmax(W · norm(Σₙ aₙ Xₙ))",
    figure: [bars(story.top[at].map(([id, value]) => ({ name: idName(story, id), value, picked: id === follows })), { most: 1, show: percent,
      label: `The ${story.top[at].length} likeliest tokens` }),
    h("p", { class: "caption" }, ...(known ? ["In the text follows ", tokenName(story, place + 1), `: probability ${percent(known[0])}, rank ${known[1]} of ${story.config.vocab_size}.`]
      : ["The text ends here."])),
    bars(story.collapse[at].map((value, stream) => ({ name: streamName(stream), value })), { most: 1, label: "Weight of each stream" })],
  };
}

const KINDS = { window: "window only", csa: "CSA", hca: "HCA" };

/** All steps of a journey: {name, group, layer (index or null), draw(at, ui)}. */
function stepsOf(story) {
  const steps = [{ name: "Token", group: "In", layer: null, draw: (at) => tokenPanel(story, null, at) }];
  story.layers.forEach((layer, index) => {
    const group = `Layer ${index} · ${KINDS[layer.kind]}${layer.ratio ? ` ${layer.ratio}` : ""}`;
    const add = (name, panel, extra = index) => steps.push({ name, group, layer: index, draw: (at, ui) => panel(story, layer, at, extra, ui) });
    add("Streams", streamsPanel, 0);
    add("Window", windowPanel);
    if (layer.ratio) add("Entries", entriesPanel);
    add("Softmax", sharePanel);
    add("Streams again", streamsPanel, 1);
    add("Experts", expertsPanel);
    add("After", afterPanel);
  });
  steps.push({ name: "Next token", group: "Out", layer: null, draw: (at) => predictionPanel(story, null, at) });
  return steps;
}
