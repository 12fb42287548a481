// The panel of settings and the dialog that asks for the API key.

import { byId, notify } from "./dom.js";
import { loadKey, saveKey, saveSettings } from "./store.js";
import { readTools } from "./turn.js";

const TEXTS = ["system", "temperature", "top_p", "max_tokens", "seed", "tools"];

const EXAMPLE = [{
  type: "function",
  function: {
    name: "get_weather",
    description: "The weather at a place now.",
    parameters: {
      type: "object",
      properties: { place: { type: "string" }, unit: { type: "string", enum: ["celsius", "fahrenheit"] } },
      required: ["place"],
    },
  },
}];

/** Puts the chosen theme on the page; "auto" leaves it to the system. */
function applyTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}

function isDark(theme) {
  return theme === "auto" ? matchMedia("(prefers-color-scheme: dark)").matches : theme === "dark";
}

export class SettingsPanel {
  /** `changed()` is called after every change, `keyChanged()` after a new API key. */
  constructor(settings, changed, keyChanged) {
    Object.assign(this, { settings, changed, keyChanged, key: loadKey(), dialog: byId("settings"), asking: byId("ask-key") });
    applyTheme(settings.theme);
    for (const name of TEXTS) this.bindText(name);
    this.bindChecks();
    this.bindKey();
    byId("theme").value = settings.theme;
    byId("theme").addEventListener("change", (event) => this.setTheme(event.target.value));
    byId("theme-toggle").addEventListener("click", () => this.setTheme(isDark(settings.theme) ? "light" : "dark"));
    byId("open-settings").addEventListener("click", () => this.dialog.showModal());
    byId("tools-example").addEventListener("click", () => this.fillExample());
    for (const dialog of [this.dialog, this.asking]) {
      dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
      dialog.querySelector(".close").addEventListener("click", () => dialog.close());
    }
  }

  save() {
    if (!saveSettings(this.settings)) notify("The browser's storage is full: the settings are not saved.");
    this.changed();
  }

  bindText(name) {
    const field = byId(`set-${name}`);
    field.value = this.settings[name];
    field.addEventListener("input", () => {
      const fine = name === "tools" ? this.checkTools() : field.checkValidity();
      field.setAttribute("aria-invalid", String(!fine));
      if (!fine && name !== "tools") return;
      this.settings[name] = field.value;
      this.save();
    });
  }

  bindChecks() {
    const offer = byId("set-offer-tools");
    offer.checked = this.settings.offerTools;
    offer.addEventListener("change", () => {
      this.settings.offerTools = offer.checked;
      this.checkTools();
      this.save();
    });
    this.checkTools();
  }

  checkTools() {
    const problem = byId("tools-problem");
    try {
      const tools = readTools(byId("set-tools").value);
      problem.textContent = tools.length ? `Tools: ${tools.map((tool) => tool.function.name).join(", ")}` : "";
      problem.classList.remove("bad");
      return true;
    } catch (error) {
      problem.textContent = `Not usable yet: ${error.message}`;
      problem.classList.add("bad");
      return false;
    }
  }

  fillExample() {
    byId("set-tools").value = JSON.stringify(EXAMPLE, null, 2);
    byId("set-offer-tools").checked = this.settings.offerTools = true;
    byId("set-tools").dispatchEvent(new Event("input"));
  }

  bindKey() {
    const field = byId("set-key");
    const remember = byId("set-remember");
    field.value = this.key;
    remember.checked = this.settings.rememberKey;
    field.addEventListener("change", () => this.setKey(field.value.trim(), remember.checked));
    remember.addEventListener("change", () => this.setKey(field.value.trim(), remember.checked));
    byId("ask-field").addEventListener("keydown", (event) => {
      if (event.key === "Enter") byId("ask-use").click();
    });
    byId("ask-use").addEventListener("click", () => {
      const key = byId("ask-field").value.trim();
      if (!key) return;
      this.asking.close();
      this.setKey(key, byId("ask-remember").checked);
      this.afterKey?.();
    });
  }

  setKey(key, remember) {
    this.key = key;
    saveKey(key, remember);
    byId("set-key").value = key;
    byId("set-remember").checked = this.settings.rememberKey = remember;
    this.save();
    this.keyChanged();
  }

  /** Asks for the API key; `then()` runs once there is one. */
  askKey(then) {
    this.afterKey = then;
    byId("ask-field").value = "";
    byId("ask-remember").checked = this.settings.rememberKey;
    if (!this.asking.open) this.asking.showModal();
  }

  setTheme(theme) {
    this.settings.theme = byId("theme").value = theme;
    applyTheme(theme);
    this.save();
  }

  /** Shows the panel with what is wrong in it. */
  showProblem(text) {
    notify(text);
    if (!this.dialog.open) this.dialog.showModal();
    byId("set-tools").focus();
  }
}
