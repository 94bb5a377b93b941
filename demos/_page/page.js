"use strict";
// Language, theme, the state in the address, and buttons that copy.

const data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const element = (id) => document.getElementById(id);
const drawers = []; // of the canvases
const state = { lang: "en", theme: "", lr: data.hero.lrs[data.first], batch: 16, zoom: 0, at: "" };
const saved = { lang: false, theme: false, lr: false, batch: false, zoom: false, at: false };

function text(key, values = {}) {
  const words = data.strings[state.lang][key];
  return words.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? values[name] : whole));
}

function redraw() {
  for (const draw of drawers) draw();
}

function setLanguage(lang) {
  state.lang = lang;
  root.lang = lang === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-text]")) {
    node.textContent = text(node.dataset.text, JSON.parse(node.dataset.values || "{}"));
  }
  for (const node of document.querySelectorAll("[data-label]")) {
    node.setAttribute("aria-label", text(node.dataset.label));
    if (node.tagName === "BUTTON") node.title = text(node.dataset.label);
  }
  const questions = data.questions[lang] || {};
  for (const node of document.querySelectorAll("[data-question]")) {
    const translated = questions[node.dataset.question];
    node.textContent = translated || node.dataset.question;
    node.lang = translated || lang === "en" ? root.lang : "en";
  }
  for (const node of document.querySelectorAll(".card h3")) node.lang = "en";
  for (const node of document.querySelectorAll("[data-lang]")) {
    node.setAttribute("aria-pressed", String(node.dataset.lang === lang));
  }
  document.title = text("title");
}

function isDark() {
  return state.theme ? state.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function setTheme(theme) {
  state.theme = theme;
  if (theme) root.dataset.theme = theme;
  else root.dataset.theme = isDark() ? "dark" : "light";
}

// The address holds what the reader has chosen, so that a link leads to what is seen.
function keep(...names) {
  for (const name of names) saved[name] = true;
  const pairs = Object.keys(saved).filter((name) => saved[name] && state[name] !== "");
  const hash = "#" + pairs.map((name) => `${name}=${encodeURIComponent(state[name])}`).join("&");
  try {
    history.replaceState(null, "", hash);
  } catch {
    location.hash = hash;
  }
}

function restore() {
  const found = new URLSearchParams(location.hash.slice(1));
  for (const name of Object.keys(saved)) {
    if (!found.has(name)) continue;
    saved[name] = true;
    state[name] = name === "batch" || name === "zoom" ? Number(found.get(name)) : found.get(name);
  }
  if (!(state.lang in data.strings)) state.lang = "en";
  if (state.theme !== "dark" && state.theme !== "light") state.theme = "";
  if (!data.hero.lrs.includes(state.lr)) state.lr = nearest(Number(state.lr));
  if (!data.hero.runs.some((run) => run.batch === state.batch)) state.batch = 16;
}

// A link may have a learning rate of another gallery.
function nearest(lr) {
  if (!(lr > 0)) return data.hero.lrs[data.first];
  const apart = (other) => Math.abs(Math.log(other / lr));
  return data.hero.lrs.reduce((best, other) => (apart(other) < apart(best) ? other : best));
}

async function copy(words, button) {
  try {
    await navigator.clipboard.writeText(words);
  } catch {
    const field = document.createElement("textarea");
    field.value = words;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  const label = button.querySelector("[data-text]") || button;
  label.textContent = text("copied");
  setTimeout(() => (label.textContent = text(label.dataset.text)), 1400);
}

// A canvas of as many pixels as the screen has for it, with the page's colours and its width and height.
function canvas(id) {
  const node = element(id);
  const { width, height } = node.getBoundingClientRect();
  const ratio = window.devicePixelRatio || 1;
  // Setting the size clears the canvas, and its pen of the drawing before.
  [node.width, node.height] = [Math.round(width * ratio), Math.round(height * ratio)];
  const pen = node.getContext("2d");
  pen.scale(ratio, ratio);
  const style = getComputedStyle(root);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  pen.font = `12px ${colour("sans")}`;
  return { pen, width, height, colour };
}

// The numbers that the builder wrote: 16-bit integers in base64.
function decode(words) {
  const bytes = Uint8Array.from(atob(words), (letter) => letter.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Float64Array.from({ length: bytes.length / 2 }, (_, i) => {
    const value = view.getInt16(2 * i, true);
    return value === -32768 ? NaN : value / 32767;
  });
}

function start() {
  restore();
  setTheme(state.theme);
  setLanguage(state.lang);
  for (const node of document.querySelectorAll("[data-lang]")) {
    node.addEventListener("click", () => {
      setLanguage(node.dataset.lang);
      keep("lang");
      redraw();
    });
  }
  element("theme").addEventListener("click", () => {
    setTheme(isDark() ? "light" : "dark");
    keep("theme");
    redraw();
  });
  element("link").addEventListener("click", (event) => {
    keep("lr", "batch");
    copy(location.href, event.currentTarget);
  });
  for (const node of document.querySelectorAll("[data-copy], .code .copy")) {
    const words = () => node.dataset.copy || node.parentElement.querySelector("code").textContent;
    node.addEventListener("click", () => copy(words(), node));
  }
  addEventListener("hashchange", () => {
    restore();
    setTheme(state.theme);
    setLanguage(state.lang);
    redraw();
  });
  addEventListener("resize", redraw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    setTheme(state.theme);
    redraw();
  });
  // Paper is white.
  addEventListener("beforeprint", () => {
    root.dataset.theme = "light";
    redraw();
  });
  addEventListener("afterprint", () => {
    setTheme(state.theme);
    redraw();
  });
}
