// The architecture view: a column for each site, a cell for each channel.

const canvas = byId("canvas");
const tip = byId("tip");
const hidden = new Set();
let layout = null;
let cursor = null; // [site, place in its column]
let arrangement = [];

const SETS = [
  ["a", "only A"],
  ["both", "both"],
  ["b", "only B"],
  ["closed", "neither"],
];

// What certainty says of the kept channels, class by class: a set for each label.
const SURE = DATA.certainty && {
  labels: bytes(DATA.certainty.labels),
  chosen: bytes(DATA.certainty.chosen),
};
const LABELS = ["closed", "a", "b", "nothing", "undecided"];
const labelOf = (task, i) => (SURE ? SURE.labels[task * CHANNELS + i] : 0);
const isSure = () => SURE && SITES.length > 0 && SURE.labels.subarray(state.a * CHANNELS, (state.a + 1) * CHANNELS).some(Boolean);

/** Sizes of everything: cells are squares of one size, so that columns show how wide the sites are. */
function arrange() {
  const width = printing ? PAPER : Math.max(240, byId("canvas-scroll").clientWidth - 6);
  const n = SITES.length;
  const gap = n > 40 ? 4 : n > 14 ? 7 : 12;
  const column = Math.max(22, Math.min(110, Math.floor((width - gap * (n - 1)) / n)));
  const height = 430;
  let cell = 24;
  const rows = (site, size) => Math.ceil(site.channels / Math.max(1, Math.floor(column / size)));
  while (cell > 2 && SITES.some((site) => rows(site, cell) * cell > height)) cell -= cell > 6 ? 1 : 0.5;
  const perRow = Math.max(1, Math.floor(column / cell));
  const tallest = Math.max(...SITES.map((site) => Math.ceil(site.channels / perRow))) * cell;
  const context = canvas.getContext("2d");
  context.font = LABEL;
  const widest = Math.max(...SITES.map((site) => context.measureText(shortened(site.name)).width));
  const upright = widest > column + gap - 4;
  const bottom = upright ? widest + 10 : 20;
  layout = {
    cell, perRow, column, gap, upright, tallest, bottom,
    width: n * column + gap * (n - 1),
    height: tallest + bottom,
  };
  const scale = window.devicePixelRatio || 1;
  canvas.width = Math.ceil(layout.width * scale);
  canvas.height = Math.ceil(layout.height * scale);
  canvas.style.width = `${layout.width}px`;
  canvas.style.height = `${layout.height}px`;
}
const LABEL = "12px system-ui, sans-serif";
const shortened = (name) => (name.length > 26 ? `…${name.slice(-25)}` : name);

/** Which channel stands at which place of its site's column. */
function order() {
  const byGate = byId("arrange").value === "gate";
  const row = byGate ? levels(state.a) : null;
  arrangement = SITES.map((site) => {
    const places = Array.from({ length: site.channels }, (_, i) => i);
    if (byGate) places.sort((i, j) => row[site.start + j] - row[site.start + i] || i - j);
    return places;
  });
}

function setOf(levelA, levelB, i) {
  if (levelB === null && labelOf(state.a, i)) return LABELS[labelOf(state.a, i)];
  const inA = isKept(levelA);
  const inB = levelB !== null && isKept(levelB);
  return inA && inB ? "both" : inA ? "a" : inB ? "b" : "closed";
}

function draw() {
  const context = canvas.getContext("2d");
  const scale = window.devicePixelRatio || 1;
  const paint = colours();
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.fillStyle = paint.card;
  context.fillRect(0, 0, layout.width, layout.height);
  const [a, b] = [levels(state.a), state.b === null ? null : levels(state.b)];
  const { cell, perRow, column, gap, tallest } = layout;
  const inner = cell > 5 ? cell - 1 : cell > 2.5 ? cell - 0.5 : cell;
  const cells = { a: [], b: [], both: [], nothing: [], undecided: [], closed: [] };
  const sure = b === null && isSure();
  SITES.forEach((site, s) => {
    const left = s * (column + gap);
    arrangement[s].forEach((channel, place) => {
      const i = site.start + channel;
      const set = setOf(a[i], b && b[i], i);
      const strength = b === null && set === "a" && !sure ? gateOf(a[i]) : 1;
      cells[set].push(left + (place % perRow) * cell, Math.floor(place / perRow) * cell, strength);
    });
  });
  for (const [set, places] of Object.entries(cells)) {
    context.fillStyle = hidden.has(set) && set !== "closed" ? paint.closed : paint[set];
    if (set === "closed" && hidden.has(set)) continue;
    for (let i = 0; i < places.length; i += 3) {
      // Alone, a class's gates between one half and one go from pale to full.
      context.globalAlpha = places[i + 2] === 1 ? 1 : 0.55 + 0.45 * (2 * places[i + 2] - 1);
      context.fillRect(places[i], places[i + 1], inner, inner);
    }
    context.globalAlpha = 1;
  }
  context.font = LABEL;
  context.fillStyle = paint.ink;
  SITES.forEach((site, s) => {
    const left = s * (column + gap);
    const name = shortened(site.name);
    if (layout.upright) {
      context.save();
      context.translate(left + column / 2 + 4, tallest + 6);
      context.rotate(Math.PI / 2);
      context.textAlign = "left";
      context.textBaseline = "bottom";
      context.fillText(name, 0, 2);
      context.restore();
    } else {
      context.textAlign = "left";
      context.textBaseline = "top";
      context.fillText(name, left, tallest + 5);
    }
  });
  if (cursor) {
    const [s, place] = cursor;
    context.strokeStyle = paint.ink;
    context.lineWidth = 2;
    const x = s * (column + gap) + (place % perRow) * cell;
    const y = Math.floor(place / perRow) * cell;
    context.strokeRect(x - 1.5, y - 1.5, inner + 3, inner + 3);
  }
}

/** What there is to say of a channel: lines of text. */
function described([s, place]) {
  const site = SITES[s];
  const channel = arrangement[s][place];
  const i = site.start + channel;
  const exact = DATA.bits === 8 ? 2 : 1;
  const says = (task) => {
    const level = levels(task)[i];
    return `${isKept(level) ? "kept" : "closed"}, gate ${decimals(gateOf(level), exact)}`;
  };
  const lines = [`${site.name}, channel ${channel}`];
  if (state.b === null) lines.push(`${TASKS[state.a]}: ${says(state.a)}`);
  else lines.push(`A, ${TASKS[state.a]}: ${says(state.a)}`, `B, ${TASKS[state.b]}: ${says(state.b)}`);
  if (state.b === null && labelOf(state.a, i)) {
    const share = percent(SURE.chosen[state.a * CHANNELS + i] / 255);
    lines.push(`${DATA.certainty.names[labelOf(state.a, i)]}, chosen by ${share} of the halves`);
  }
  const concept = conceptOf(i);
  if (concept) lines.push(concept);
  return { lines, pictures: picturesOf(i) };
}

function at(event) {
  const box = canvas.getBoundingClientRect();
  const x = ((event.clientX - box.left) * layout.width) / box.width;
  const y = ((event.clientY - box.top) * layout.height) / box.height;
  const s = Math.floor(x / (layout.column + layout.gap));
  if (s < 0 || s >= SITES.length || y < 0) return null;
  const inside = Math.floor((x - s * (layout.column + layout.gap)) / layout.cell);
  if (inside >= layout.perRow) return null;
  const place = Math.floor(y / layout.cell) * layout.perRow + inside;
  return place < SITES[s].channels ? [s, place] : null;
}

function showTip(where, x, y) {
  const { lines, pictures } = described(where);
  tip.replaceChildren(...lines.map((line, i) => element(i ? "div" : "b", {}, line)));
  if (pictures.length) {
    tip.append(element("div", {}, ...pictures.slice(0, 5).map((number) => picture(number, ""))));
  }
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(x + 14, window.innerWidth - box.width - 8))}px`;
  tip.style.top = `${y + 18 + box.height > window.innerHeight ? Math.max(4, y - box.height - 12) : y + 18}px`;
}

function point(where) {
  cursor = where;
  draw();
  if (!where) return;
  byId("cell").textContent = described(where).lines.join(" · ");
}

canvas.addEventListener("mousemove", (event) => {
  const where = at(event);
  if (!where) {
    tip.hidden = true;
    if (cursor) point(null);
    return;
  }
  if (!cursor || cursor[0] !== where[0] || cursor[1] !== where[1]) point(where);
  showTip(where, event.clientX, event.clientY);
});
canvas.addEventListener("mouseleave", () => {
  tip.hidden = true;
});
canvas.addEventListener("blur", () => {
  tip.hidden = true;
});
canvas.addEventListener("keydown", (event) => {
  const [s, place] = cursor || [0, 0];
  const { perRow } = layout;
  const moves = {
    ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [0, perRow], ArrowUp: [0, -perRow],
    PageDown: [1, 0], PageUp: [-1, 0], Home: [-s, -place], End: [SITES.length - 1 - s, 0],
  };
  if (event.key === "Escape") {
    tip.hidden = true;
    return;
  }
  const move = moves[event.key];
  if (!move) return;
  event.preventDefault();
  let [next, spot] = cursor ? [s + move[0], place + move[1]] : [0, 0];
  next = Math.max(0, Math.min(SITES.length - 1, next));
  if (spot < 0 && next > 0 && move[1] === -1) {
    next -= 1;
    spot = SITES[next].channels - 1;
  } else if (spot >= SITES[next].channels && move[1] === 1 && next < SITES.length - 1) {
    next += 1;
    spot = 0;
  }
  point([next, Math.max(0, Math.min(SITES[next].channels - 1, spot))]);
  const box = canvas.getBoundingClientRect();
  const [column, row] = [cursor[1] % perRow, Math.floor(cursor[1] / perRow)];
  const x = next * (layout.column + layout.gap) + column * layout.cell;
  byId("canvas-scroll").scrollLeft = Math.max(0, x - byId("canvas-scroll").clientWidth / 2);
  showTip(cursor, canvas.getBoundingClientRect().left + x, box.top + row * layout.cell);
});

function legend() {
  const counts = { a: 0, b: 0, both: 0, nothing: 0, undecided: 0, closed: 0 };
  const [a, b] = [levels(state.a), state.b === null ? null : levels(state.b)];
  for (let i = 0; i < CHANNELS; i++) counts[setOf(a[i], b && b[i], i)]++;
  const alone = isSure()
    ? [1, 2, 3, 4, 0].map((k) => [LABELS[k], DATA.certainty.names[k] || "closed"])
    : [["a", "kept"], ["closed", "closed"]];
  const names = state.b === null ? alone : SETS;
  byId("legend").replaceChildren(
    ...names.map(([set, text]) =>
      element(
        "button",
        {
          type: "button",
          "data-set": set,
          "aria-pressed": String(!hidden.has(set)),
          title: "Press to hide or show",
          onclick: () => {
            if (!hidden.delete(set)) hidden.add(set);
            draw();
            legend();
            byId("legend").querySelector(`[data-set="${set}"]`).focus();
          },
        },
        element("span", { class: `swatch ${set}` }),
        `${text}: ${whole(counts[set])}`,
      ),
    ),
  );
}

function siteTable() {
  const other = state.b;
  const rows = other === null ? null : shared(state.a, other);
  const head = other === null
    ? ["site", "channels", "kept", "share"]
    : ["site", "channels", "A keeps", "B keeps", "both", "overlap", "kappa"];
  const body = SITES.map((site, s) => {
    const cells = rows === null
      ? [whole(keptAt(state.a, s)), percent(keptAt(state.a, s) / site.channels)]
      : [whole(rows[s].nA), whole(rows[s].nB), whole(rows[s].both), decimals(rows[s].overlap), decimals(rows[s].kappa)];
    return element(
      "tr", {}, element("th", { scope: "row" }, site.name), element("td", { class: "n" }, whole(site.channels)),
      ...cells.map((cell) => element("td", { class: "n" }, cell)),
    );
  });
  const table = element(
    "table", {},
    element("thead", {}, element("tr", {}, ...head.map((h, i) => element("th", { scope: "col", class: i ? "n" : null }, h)))),
    element("tbody", {}, ...body),
  );
  const box = element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Site by site" }, table);
  byId("site-table").lastElementChild.replaceChildren(box);
}

function redraw() {
  order();
  draw();
  legend();
  siteTable();
  const what = state.b === null ? TASKS[state.a] : `${TASKS[state.a]} and ${TASKS[state.b]}`;
  canvas.setAttribute("aria-label", `Channels of each site, ${what}; arrow keys move from channel to channel, page keys from site to site`);
  if (cursor) byId("cell").textContent = described(cursor).lines.join(" · ");
}
byId("arrange").addEventListener("change", () => {
  cursor = null;
  redraw();
});
onChange(redraw);
themeListeners.push(() => draw());
