// The data of the page, and small helpers.

const DATA = JSON.parse(document.getElementById("data").textContent);
const SITES = DATA.sites.map(([name, channels]) => ({ name, channels }));
let total = 0;
for (const site of SITES) {
  site.start = total;
  total += site.channels;
}
const CHANNELS = total;
const TASKS = DATA.tasks;

const byId = (id) => document.getElementById(id);

/** An element with attributes and children; texts are never read as HTML. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  for (const child of children) if (child !== null && child !== undefined) made.append(child);
  return made;
}

function bytes(text) {
  const binary = atob(text);
  const result = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) result[i] = binary.charCodeAt(i);
  return result;
}

const decimals = (value, digits = 2) =>
  value === null || value === undefined || Number.isNaN(value) ? "–" : value.toFixed(digits);
const percent = (share) => `${Number((100 * share).toPrecision(3))} %`;
const whole = (n) => n.toLocaleString("en");

// -- Gates ---------------------------------------------------------------------------------------

let gateLines = null;
const gateRows = new Map();

/** The levels of a task's gates; see nad_attr.report.packing.gate_levels. */
function levels(task) {
  if (gateLines === null) gateLines = byId("gates").textContent.split("\n");
  if (!gateRows.has(task)) {
    let row = bytes(gateLines[task].trim());
    if (DATA.bits === 4) {
      const wide = new Uint8Array(2 * row.length);
      for (let i = 0; i < row.length; i++) {
        wide[2 * i] = row[i] >> 4;
        wide[2 * i + 1] = row[i] & 15;
      }
      row = wide.subarray(0, CHANNELS);
    }
    if (gateRows.size > 64) gateRows.delete(gateRows.keys().next().value);
    gateRows.set(task, row);
  }
  return gateRows.get(task);
}

const HALF = 2 ** (DATA.bits - 1);
const gateOf = (level) => (level < HALF ? level / (HALF - 1) / 2 : 0.5 + (level - HALF) / (HALF - 1) / 2);
const isKept = (level) => level >= HALF;

const COUNTS = new Uint32Array(bytes(DATA.counts).buffer);
const keptAt = (task, site) => COUNTS[task * SITES.length + site];
const keptIn = (task) => {
  let sum = 0;
  for (let s = 0; s < SITES.length; s++) sum += keptAt(task, s);
  return sum;
};

/** |A and B| / |A or B| and the same beyond chance, site by site; as nad_attr.gates.channels.kappa. */
function shared(a, b) {
  const [one, other] = [levels(a), levels(b)];
  return SITES.map((site, s) => {
    let both = 0;
    for (let i = site.start; i < site.start + site.channels; i++) {
      if (isKept(one[i]) && isKept(other[i])) both++;
    }
    const [nA, nB] = [keptAt(a, s), keptAt(b, s)];
    const union = nA + nB - both;
    const overlap = union ? both / union : 1;
    const chance = (nA * nB) / site.channels;
    const chanceUnion = nA + nB - chance;
    const expected = chanceUnion ? chance / chanceUnion : 1;
    return { both, nA, nB, overlap, kappa: expected === 1 ? 1 : (overlap - expected) / (1 - expected) };
  });
}
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

// -- What the user chose -------------------------------------------------------------------------

const state = { a: 0, b: null, slot: "a", theme: "system" };
const listeners = [];
const onChange = (listener) => listeners.push(listener);

function choose(a, b) {
  if (a === b) b = null;
  if (a === state.a && b === state.b) return;
  [state.a, state.b] = [a, b];
  for (const listener of listeners) safely(listener);
}

/** One part that fails must not take the others with it. */
function safely(work) {
  try {
    return work();
  } catch (error) {
    console.error(error);
    return null;
  }
}

// -- Colours -------------------------------------------------------------------------------------

const themeListeners = [];
let printing = false;
// Pixels across a printed page, A4 or Letter, between its margins.
const PAPER = 670;
const DARK = window.matchMedia("(prefers-color-scheme: dark)");

function colours() {
  const style = getComputedStyle(document.documentElement);
  const found = {};
  for (const name of ["page", "card", "ink", "soft", "line", "a", "b", "both", "closed", "nothing", "undecided"]) {
    found[name] = style.getPropertyValue(`--${name}`).trim();
  }
  if (printing) {
    Object.assign(found, { page: "#fff", card: "#fff", ink: "#000", soft: "#444", line: "#bbb" });
    Object.assign(found, { a: "#0072b2", b: "#e69f00", both: "#15191d", closed: "#dfe4e8" });
    Object.assign(found, { nothing: "#9aa5ae", undecided: "#cc79a7" });
  }
  return found;
}
const isDark = () => !printing && (state.theme === "dark" || (state.theme === "system" && DARK.matches));

function setTheme(theme) {
  state.theme = theme;
  if (theme === "system") document.documentElement.removeAttribute("data-theme");
  else document.documentElement.setAttribute("data-theme", theme);
  const button = byId("theme");
  button.textContent = `Colours: ${theme}`;
  button.setAttribute("aria-label", `Colours: ${theme === "system" ? "as the system says" : theme}. Press to change.`);
  themeChanged();
}
function themeChanged() {
  for (const listener of themeListeners) safely(listener);
}

// -- Concepts and pictures of channels --------------------------------------------------------------

const UNITS = DATA.units && {
  concepts: DATA.units.concepts,
  best: new Int32Array(bytes(DATA.units.best).buffer),
  iou: new Float32Array(bytes(DATA.units.iou).buffer),
  detector: bytes(DATA.units.detector),
};
/** The concept of a channel in words, or nothing. */
function conceptOf(channel) {
  if (!UNITS || UNITS.best[channel] < 0) return "";
  const [name, category] = UNITS.concepts[UNITS.best[channel]];
  const kind = category ? ` (${category})` : "";
  const sure = UNITS.detector[channel] ? "" : ", too little for a detector";
  return `${name}${kind}, IoU ${decimals(UNITS.iou[channel], 3)}${sure}`;
}

const ALBUM = (DATA.pictures && DATA.pictures.album) || [];
const TOP = DATA.pictures && DATA.pictures.top ? new Int32Array(bytes(DATA.pictures.top).buffer) : null;
function picturesOf(channel) {
  if (!TOP) return [];
  const n = DATA.pictures.per_channel;
  return Array.from(TOP.subarray(channel * n, (channel + 1) * n)).filter((i) => i >= 0 && i < ALBUM.length);
}
const picture = (number, text) => element("img", { src: ALBUM[number], alt: text, loading: "lazy" });
