// The page: which token, which step, keys, the address that remembers both.

const story = JSON.parse(byId("story").textContent);
const steps = stepsOf(story);
const state = { at: story.tokens.length - 1 - story.first, step: 0 };
const ui = { entry: null, focusEntry: (slot) => { ui.entry = ui.entry === slot ? null : slot; draw(); byId("panel").querySelector(`[data-entry="${slot}"]`)?.focus(); } };

const clamp = (value, most) => Math.max(0, Math.min(most, value));

function describe() {
  const { config } = story;
  byId("subject").textContent = `${story.name}: ${config.num_hidden_layers} layers, width ${config.hidden_size}, ${config.num_attention_heads} heads, ` +
    `${config.n_routed_experts} experts, ${story.tokens.length} tokens read in one pass`;
  byId("untrained").hidden = story.trained;
  byId("untrained").textContent = "This model is untrained: its weights are random, so what it prefers means nothing. How it works is the same. For a model that has learned something: " +
    "fathom explain RUN.";
  document.title = `One token's journey: ${story.name}`;
}

/** The tokens as a list to choose from; those before `first` have no journey on this page. */
function buildTokens() {
  byId("tokens").append(...story.tokens.map((id, place) => h("span", {
    role: "option", class: "token", id: `token-${place}`, "aria-selected": "false", "aria-disabled": place < story.first ? "true" : null, "data-place": place,
    text: plain(story.texts[id]).replaceAll("\n", "⏎\n"), onclick: () => go({ at: place - story.first }) })));
}

function buildSteps() {
  const groups = new Map();
  steps.forEach((step, index) => groups.set(step.group, [...groups.get(step.group) ?? [], { step, index }]));
  for (const [group, members] of groups) {
    byId("rail").append(h("section", {}, h("h2", { text: group }), h("ol", {}, members.map(({ step, index }) =>
      h("li", {}, h("button", { type: "button", "data-step": index, text: step.name, onclick: () => go({ step: index }) }))))));
    byId("step").append(h("optgroup", { label: group }, members.map(({ step, index }) => h("option", { value: index, text: step.name }))));
  }
}

function go({ at = state.at, step = state.step }) {
  const before = { ...state };
  state.at = clamp(at, story.tokens.length - 1 - story.first);
  state.step = clamp(step, steps.length - 1);
  if (before.at !== state.at || before.step !== state.step) ui.entry = null;
  draw();
}

function draw() {
  const step = steps[state.step];
  const place = story.first + state.at;
  const { title, about, source, formula, figure, heat = new Map(), legend = "" } = step.draw(state.at, ui);
  byId("panel").replaceChildren(
    h("p", { class: "where", text: step.layer === null ? step.group : `${step.group} · ${step.layer + 1} of ${story.layers.length}` }), h("h2", { text: title }),
    h("p", { class: "about", text: about }), h("p", { class: "formula", text: formula }), h("p", { class: "source", text: source }), h("figure", {}, figure));
  drawTokens(place, heat);
  byId("legend").textContent = legend || "Choose a token, then step through the model. The page shows what really happened to it in one pass.";
  for (const button of byId("rail").querySelectorAll("button")) {
    if (Number(button.dataset.step) === state.step) button.setAttribute("aria-current", "step");
    else button.removeAttribute("aria-current");
  }
  keepInside(byId("rail"), byId("rail").querySelector("[aria-current]"));
  byId("step").value = String(state.step);
  byId("back").disabled = state.step === 0;
  byId("on").disabled = state.step === steps.length - 1;
  byId("status").textContent = `${step.group}, ${step.name}. Token ${visible(story.texts[story.tokens[place]])}`;
  history.replaceState(null, "", `#token=${place}&step=${state.step}`);
}

function drawTokens(place, heat) {
  for (const token of byId("tokens").children) {
    const own = Number(token.dataset.place);
    token.style.setProperty("--heat", String(heat.get(own) ?? 0));
    token.classList.toggle("later", own > place);
    token.setAttribute("aria-selected", String(own === place));
  }
  byId("tokens").setAttribute("aria-activedescendant", `token-${place}`);
  keepInside(byId("tokens"), byId(`token-${place}`));
}

/** Scrolls `box`, and nothing else, until `item` is in it. */
function keepInside(box, item) {
  if (!item || box.clientHeight === 0) return;
  const outer = box.getBoundingClientRect();
  const inner = item.getBoundingClientRect();
  if (inner.top < outer.top) box.scrollTop -= outer.top - inner.top + 8;
  else if (inner.bottom > outer.bottom) box.scrollTop += inner.bottom - outer.bottom + 8;
}

/** The first step of the next layer, or of this one or the one before. */
function layerStep(direction) {
  const starts = steps.flatMap((step, index) => (index === 0 || step.group !== steps[index - 1].group ? [index] : []));
  return direction > 0 ? starts.find((index) => index > state.step) ?? steps.length - 1 : starts.findLast((index) => index < state.step) ?? 0;
}

const KEYS = {
  ArrowDown: (shift) => go({ step: shift ? layerStep(1) : state.step + 1 }), ArrowUp: (shift) => go({ step: shift ? layerStep(-1) : state.step - 1 }),
  ArrowRight: () => go({ at: state.at + 1 }), ArrowLeft: () => go({ at: state.at - 1 }), Home: () => go({ step: 0 }), End: () => go({ step: steps.length - 1 }),
};

function readAddress() {
  const values = new URLSearchParams(location.hash.slice(1));
  const place = Number(values.get("token") ?? NaN);
  const step = Number(values.get("step") ?? NaN);
  go({ at: Number.isInteger(place) ? place - story.first : state.at, step: Number.isInteger(step) ? step : state.step });
}

function bind() {
  byId("back").addEventListener("click", () => go({ step: state.step - 1 }));
  byId("on").addEventListener("click", () => go({ step: state.step + 1 }));
  byId("step").addEventListener("change", (event) => go({ step: Number(event.target.value) }));
  byId("theme").addEventListener("click", () => {
    const { dataset } = document.documentElement;
    const dark = dataset.theme ? dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    dataset.theme = dark ? "light" : "dark";
  });
  addEventListener("hashchange", readAddress);
  document.addEventListener("keydown", (event) => {
    const scrolling = event.target.closest?.(".scroll") && event.key.startsWith("Arrow");
    if (!KEYS[event.key] || event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT" || scrolling) return;
    event.preventDefault();
    KEYS[event.key](event.shiftKey);
  });
}

describe();
buildTokens();
buildSteps();
bind();
readAddress();
