// The page comes to life: settings, conversations, composer, shortcuts.

import { listModels } from "./api.js";
import { Chat } from "./chat.js";
import { autosize, byId, drawIcons, h, icon } from "./dom.js";
import { Meter } from "./meter.js";
import { SettingsPanel } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { concernsList, loadSettings, saveSettings } from "./store.js";

const settings = loadSettings();
const prompt = byId("prompt");
const touch = matchMedia("(pointer: coarse)");
let models = [];

drawIcons();
const panel = new SettingsPanel(settings, refresh, showModels);
const chat = new Chat(settings, {
  changed: refresh, key: () => panel.key, problem: (text) => panel.showProblem(text), askKey: (then) => panel.askKey(then),
});
const sidebar = new Sidebar(chat);
const meter = new Meter(settings, () => {
  saveSettings(settings);
  chat.render();
  refresh();
}, () => panel.key);

/** Everything outside the thread that depends on the conversation or the settings. */
function refresh() {
  const running = chat.turn !== null;
  const send = byId("send");
  send.replaceChildren(icon(running ? "stop" : "send"));
  send.setAttribute("aria-label", running ? "Stop" : "Send");
  send.title = running ? "Stop (Esc)" : "Send (Enter)";
  send.classList.toggle("running", running);
  send.disabled = !running && prompt.value.trim() === "";
  byId("tools-on").hidden = !settings.offerTools || settings.tools.trim() === "";
  meter.update(chat.conversation, models.find((model) => model.id === settings.model)?.context ?? null);
  sidebar.render();
}

/** Asks the server what it offers. Without an answer, the model chosen last stays. */
async function showModels() {
  try {
    models = await listModels(panel.key);
  } catch (error) {
    if (error.status === 401) panel.askKey(() => {});
    return;
  }
  if (!models.some((model) => model.id === settings.model)) settings.model = models[0]?.id ?? "";
  byId("model").replaceChildren(...models.map(({ id }) => h("option", { value: id, text: id })));
  byId("model").value = settings.model;
  refresh();
}

async function submit() {
  const text = prompt.value;
  if (chat.turn || text.trim() === "") return;
  if (!settings.model) await showModels();
  if (!chat.send(text)) return;
  prompt.value = "";
  prompt.dispatchEvent(new Event("input"));
  prompt.focus();
}

function bindComposer() {
  autosize(prompt);
  prompt.addEventListener("input", () => { byId("send").disabled = !chat.turn && prompt.value.trim() === ""; });
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "ArrowUp" && prompt.value === "" && !chat.turn) {
      event.preventDefault();
      chat.editLast();
    }
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || (touch.matches && !event.ctrlKey)) return;
    event.preventDefault();
    submit();
  });
  byId("send").addEventListener("click", () => (chat.turn ? chat.stop() : submit()));
  byId("tools-on").addEventListener("click", () => byId("open-settings").click());
  for (const radio of document.getElementsByName("mode")) {
    radio.checked = radio.value === settings.mode;
    radio.addEventListener("change", () => {
      settings.mode = radio.value;
      saveSettings(settings);
    });
  }
  byId("model").addEventListener("change", (event) => {
    settings.model = event.target.value;
    saveSettings(settings);
    refresh();
  });
  for (const example of document.querySelectorAll(".example")) {
    example.addEventListener("click", () => {
      prompt.value = example.textContent.trim();
      submit();
    });
  }
}

function bindPage() {
  document.addEventListener("keydown", (event) => {
    if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "k") {
      event.preventDefault();
      for (const dialog of document.querySelectorAll("dialog[open]")) dialog.close();
      sidebar.startNew();
    } else if (event.key === "Escape" && !document.querySelector("dialog[open]") && !sidebar.close()) {
      if (byId("meter").open) byId("meter").open = false;
      else chat.stop();
    }
  });
  addEventListener("storage", (event) => concernsList(event) && sidebar.render());
  addEventListener("hashchange", () => chat.open(location.hash.slice(1)));
  addEventListener("pagehide", () => chat.leave());
  addEventListener("pageshow", () => { chat.left = false; });
}

bindComposer();
bindPage();
chat.open(location.hash.slice(1));
showModels();
if (!touch.matches) prompt.focus();
