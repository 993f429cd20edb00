// The charts, drawn by Plotly when they come into view.

// Okabe and Ito (2008), which stay apart for all common kinds of colour blindness.
const LIGHT = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195"];
// The same hues, light enough for a dark page.
const NIGHT = ["#56B4E9", "#F07F2E", "#2FC79A", "#E09BC4", "#F0B429", "#9AD0F2", "#B59AD6"];
const palette = (i) => (isDark() ? NIGHT : LIGHT)[i % LIGHT.length];
const GREY = "#8C8C8C";
const DASHES = ["solid", "dash", "dot", "dashdot"];

const charts = new Map(); // id -> function that gives {traces, layout}
const drawn = new Set();
const visible = new Set();

/** Plotly reads a few tags in texts: names must not be any. */
const safe = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const cut = (text, most = 28) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

function plotly() {
  if (!window.Plotly) {
    // Run only now, so that the first sight of the page does not wait for it.
    const script = document.createElement("script");
    script.textContent = byId("plotly").textContent;
    document.head.append(script);
  }
  return window.Plotly;
}

function base(extra) {
  const paint = colours();
  const axis = {
    gridcolor: paint.line, linecolor: paint.soft, zerolinecolor: paint.line, automargin: true,
    tickfont: { size: 12 }, title: { standoff: 10 },
  };
  const layout = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 13, color: paint.ink },
    margin: { l: 55, r: 15, t: 40, b: 50 },
    legend: { orientation: "h", x: 0, y: 1.02, xanchor: "left", yanchor: "bottom", font: { size: 12 } },
    hoverlabel: { bgcolor: paint.card, bordercolor: paint.soft, font: { color: paint.ink } },
    hovermode: "closest",
    ...extra,
  };
  for (const name of ["xaxis", "yaxis"]) layout[name] = { ...axis, ...(extra[name] || {}), title: { ...axis.title, ...((extra[name] || {}).title || {}) } };
  return layout;
}

const CONFIG = { displayModeBar: false, responsive: true, showTips: false };

function render(id) {
  const place = byId(id);
  const made = charts.get(id)();
  if (!place || !made) return;
  const layout = base(made.layout);
  layout.height = made.height || (printing ? 300 : 360);
  if (printing) layout.width = Math.min(made.width || PAPER, PAPER);
  else if (made.width) layout.width = Math.min(made.width, place.clientWidth);
  if (printing && made.width) layout.height = Math.min(layout.height, layout.width - 90);
  // On paper anew: what was set aside for a legend on the screen would be kept.
  const anew = printing || !drawn.has(id);
  plotly()[anew ? "newPlot" : "react"](place, made.traces, layout, CONFIG);
  if (anew && made.ready) made.ready(place);
  drawn.add(id);
}

const observer = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      const id = entry.target.id;
      if (!entry.isIntersecting) {
        visible.delete(id);
        continue;
      }
      visible.add(id);
      if (!drawn.has(id) || stale.has(id)) {
        stale.delete(id);
        safely(() => render(id));
      }
    }
  },
  { rootMargin: "300px 0px" },
);
const stale = new Set();

function chart(name, make) {
  const id = `chart-${name}`;
  if (!byId(id)) return;
  charts.set(id, make);
}
function watch() {
  for (const id of charts.keys()) observer.observe(byId(id));
}
function refresh(ids = charts.keys()) {
  for (const id of ids) {
    if (!drawn.has(id)) continue;
    if (visible.has(id) || printing) safely(() => render(id));
    else stale.add(id);
  }
}
themeListeners.push(() => refresh());

/** A line with the band between two others behind it. */
function banded(name, x, y, low, high, colour, more = {}) {
  const traces = [];
  if (low && high) {
    const fine = x.map((_, i) => i).filter((i) => low[i] !== null && high[i] !== null);
    traces.push({
      x: [...fine.map((i) => x[i]), ...fine.slice().reverse().map((i) => x[i])],
      y: [...fine.map((i) => high[i]), ...fine.slice().reverse().map((i) => low[i])],
      type: "scatter", mode: "lines", fill: "toself", fillcolor: colour, opacity: 0.18, line: { width: 0 },
      hoverinfo: "skip", showlegend: false, legendgroup: name,
    });
  }
  traces.push({ x, y, type: "scatter", mode: "lines+markers", name: safe(name), legendgroup: name, line: { color: colour, width: 2 }, marker: { color: colour, size: 5 }, ...more });
  return traces;
}

function quantile(sorted, q) {
  const at = (sorted.length - 1) * q;
  const low = Math.floor(at);
  return sorted[low] + (sorted[Math.min(low + 1, sorted.length - 1)] - sorted[low]) * (at - low);
}

// -- Sizes along depth ---------------------------------------------------------------------------

const siteTicks = (names) => ({
  tickmode: "array", tickvals: names.map((_, i) => i), ticktext: names.map((name) => safe(cut(name))),
  range: [-0.5, names.length - 0.5], title: { text: "gate site, in forward order" }, tickangle: names.length > 12 ? -60 : "auto",
});

chart("depth", () => {
  const paint = colours();
  const x = SITES.map((_, s) => s);
  const shares = SITES.map((site, s) => TASKS.map((_, task) => keptAt(task, s) / site.channels).sort((i, j) => i - j));
  const one = (task) => SITES.map((site, s) => keptAt(task, s) / site.channels);
  const text = SITES.map((site) => safe(site.name));
  const look = { text, hovertemplate: "%{text}: %{y:.1%}" };
  const several = TASKS.length > 1;
  const traces = several
    ? banded("mean over classes", x, shares.map(mean), shares.map((v) => quantile(v, 0.1)), shares.map((v) => quantile(v, 0.9)), GREY, look)
    : [];
  const names = [[`A: ${cut(TASKS[state.a])}`, state.a, paint.a, "circle"]];
  if (state.b !== null) names.push([`B: ${cut(TASKS[state.b])}`, state.b, paint.b, "square"]);
  for (const [name, task, colour, symbol] of names) {
    traces.push(...banded(name, x, one(task), null, null, colour, { ...look, marker: { color: colour, size: 8, symbol } }));
  }
  return {
    traces,
    layout: { xaxis: siteTicks(SITES.map((site) => site.name)), yaxis: { title: { text: "channels kept" }, tickformat: ".0%", rangemode: "tozero" } },
  };
});

// -- Measures --------------------------------------------------------------------------------------

const EVALUATION = DATA.evaluation;

if (EVALUATION) {
  chart("auc", () => {
    const own = EVALUATION.values.own_auc || [];
    const order = own.map((_, task) => task).filter((task) => own[task] !== null).sort((i, j) => own[j] - own[i] || i - j);
    const x = order.map((_, rank) => rank + 1);
    const text = order.map((task) => safe(TASKS[task]));
    const many = order.length > 60;
    const trace = (name, values, colour, symbol) => ({
      x, y: order.map((task) => values[task]), text, name, type: "scatter", mode: "markers",
      marker: { color: colour, symbol, size: many ? 4 : 9 }, hovertemplate: `%{text}: %{y:.2f}<extra>${name}</extra>`,
    });
    const traces = [trace("these gates", own, palette(0), "circle")];
    if (EVALUATION.whole_auc) traces.push(trace("whole network", EVALUATION.whole_auc, colours().ink, "line-ew-open"));
    if (EVALUATION.random_auc) traces.push(trace("random channels", EVALUATION.random_auc, GREY, "x"));
    const few = order.length <= 25;
    return {
      traces,
      layout: {
        xaxis: few
          ? { tickmode: "array", tickvals: x, ticktext: text.map((name) => cut(name, 18)), tickangle: "auto" }
          : { title: { text: "classes, in order of own AUC" } },
        yaxis: { title: { text: "own AUC" } },
        shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: 0.5, y1: 0.5, line: { dash: "dot", color: GREY, width: 1 } }],
      },
    };
  });

  chart("fpr", () => {
    const { recall, fpr } = EVALUATION.values;
    if (!recall || !fpr) return null;
    const tasks = TASKS.map((_, task) => task).filter((task) => recall[task] !== null && fpr[task] !== null);
    const traces = [
      {
        x: tasks.map((task) => fpr[task]), y: tasks.map((task) => recall[task]), text: tasks.map((task) => safe(TASKS[task])),
        type: "scatter", mode: "markers", name: "classes", marker: { color: palette(0), size: tasks.length > 100 ? 5 : 9, opacity: 0.75 },
        hovertemplate: "%{text}: recall %{y:.2f}, FPR %{x:.2f}<extra></extra>",
      },
    ];
    const looks = { own: ["diamond", palette(0)], rival: ["triangle-up", palette(1)], random: ["x", GREY], whole: ["star", colours().ink] };
    let rivals = 0;
    for (const row of EVALUATION.rows) {
      if (row.mean.recall === null || row.mean.fpr === null) continue;
      let [symbol, colour] = looks[row.kind];
      if (row.kind === "rival") {
        colour = palette(1 + (rivals % (LIGHT.length - 1)));
        symbol = ["triangle-up", "square", "triangle-down", "pentagon", "hexagram"][rivals++ % 5];
      }
      traces.push({
        x: [row.mean.fpr], y: [row.mean.recall], type: "scatter", mode: "markers", name: safe(row.kind === "own" ? "mean" : cut(row.name, 34)),
        marker: { symbol, color: colour, size: 13, line: { width: 1.5, color: colours().card } },
        hovertemplate: `${safe(row.name)}, mean: recall %{y:.2f}, FPR %{x:.2f}<extra></extra>`,
      });
    }
    return {
      traces,
      layout: {
        xaxis: { title: { text: "false-positive rate (less is better)" }, range: [-0.03, 1.03] },
        yaxis: { title: { text: "recall" }, range: [-0.03, 1.05] },
        shapes: [{ type: "line", x0: 0, y0: 0, x1: 1, y1: 1, line: { dash: "dot", color: GREY, width: 1 } }],
        annotations: [{ x: 1, y: 0.02, xanchor: "right", yanchor: "bottom", text: "dotted: no better than guessing", showarrow: false, font: { size: 11, color: colours().soft } }],
      },
    };
  });
}

// -- Overlaps ------------------------------------------------------------------------------------

const OVERLAPS = DATA.overlaps;

if (OVERLAPS) {
  const cells = bytes(OVERLAPS.cells);
  const n = OVERLAPS.n;
  const label = (i) => {
    const first = TASKS[OVERLAPS.order[i * OVERLAPS.step]];
    const rest = Math.min(OVERLAPS.step, TASKS.length - i * OVERLAPS.step) - 1;
    return cut(first, 22) + (rest > 0 ? ` and ${rest} more` : "");
  };
  const labels = Array.from({ length: n }, (_, i) => safe(label(i)));
  chart("overlap", () => {
    const z = Array.from({ length: n }, (_, i) => Array.from({ length: n }, (_, j) => cells[i * n + j] / 127 - 1));
    // The diagonal is 1 by definition and would hide what the others tell.
    if (OVERLAPS.step === 1) for (let i = 0; i < n; i++) z[i][i] = null;
    const values = z.flat().filter((value) => value !== null);
    const most = values.reduce((top, value) => Math.max(top, Math.abs(value)), 0.1);
    const positive = values.every((value) => value >= -0.005);
    const stride = Math.ceil(n / 50);
    const ticks = labels.map((_, i) => i).filter((i) => i % stride === 0);
    const named = n <= 50
      ? { tickmode: "array", tickvals: ticks, ticktext: ticks.map((i) => labels[i]) }
      : { showticklabels: false, ticks: "" };
    const side = Math.min(720, Math.max(380, 130 + 26 * n));
    return {
      height: side,
      // A square, with room for names on its left and the scale on its right.
      width: side + 90,
      traces: [
        {
          z, type: "heatmap", zmin: positive ? 0 : -most, zmax: most, colorscale: scaleOf(positive), xgap: n <= 30 ? 1 : 0, ygap: n <= 30 ? 1 : 0,
          customdata: Array.from({ length: n }, (_, i) => labels.map((name) => [labels[i], name])),
          hovertemplate: "%{customdata[0]} and %{customdata[1]}: kappa %{z:.2f}<extra></extra>",
          hoverongaps: false, colorbar: { title: { text: "kappa", side: "right" }, thickness: 14, outlinewidth: 0 },
        },
      ],
      layout: {
        xaxis: { ...named, tickangle: -60, constrain: "domain", showgrid: false, zeroline: false },
        yaxis: { ...named, autorange: "reversed", scaleanchor: "x", constrain: "domain", showgrid: false, zeroline: false },
        margin: { l: 60, r: 10, t: 10, b: n <= 50 ? 60 : 15 },
      },
      ready: (place) => {
        if (OVERLAPS.step > 1) return;
        place.on("plotly_click", ({ points }) => {
          const [row, column] = points[0].pointIndex;
          compare(OVERLAPS.order[row], OVERLAPS.order[column]);
        });
      },
    };
  });
}
/** Blue for more than chance, orange for less, the page's own colour in between. */
function scaleOf(positive) {
  const middle = isDark() ? "#23282d" : "#f7f7f7";
  const more = isDark() ? ["#3d7ea6", "#8fd3f9"] : ["#5aa5d6", "#08306b"];
  if (positive) return [[0, middle], [0.5, more[0]], [1, more[1]]];
  return [[0, isDark() ? "#f0a04b" : "#b35806"], [0.5, middle], [0.75, more[0]], [1, more[1]]];
}

/** Show two classes in the architecture view, and go there. */
function compare(a, b) {
  if (a === b) choose(a, null);
  else choose(a, b);
  byId("architecture").scrollIntoView();
  canvas.focus({ preventScroll: true });
}

// -- Curves, mosaics, learning ---------------------------------------------------------------------

if (DATA.curves) {
  for (const [name, kind] of [["keep", "keep"], ["ablate", "ablate"]]) {
    chart(name, () => {
      const traces = DATA.curves.flatMap((curve, i) => {
        const random = curve.name.startsWith("random");
        const colour = random ? GREY : palette(i);
        return banded(curve.name, curve.sizes, curve[kind], curve[`${kind}_low`], curve[`${kind}_high`], colour, {
          line: { color: colour, width: 2, dash: DASHES[Math.floor(i / LIGHT.length) % DASHES.length] },
          hovertemplate: `${safe(curve.name)}, %{x:.0%}: %{y:.3f}<extra></extra>`,
        });
      });
      const first = DATA.curves[0];
      const shapes = [[first.full, "dash"], [first.empty, "dot"]].filter(([value]) => value !== null).map(([value, dash]) => ({
        type: "line", xref: "paper", x0: 0, x1: 1, y0: value, y1: value, line: { dash, color: GREY, width: 1 },
      }));
      const label = DATA.measures[first.measure] || first.measure;
      return {
        traces,
        layout: {
          shapes, xaxis: { title: { text: kind === "keep" ? "channels kept, the others closed" : "channels closed, the others kept" }, tickformat: ".0%" },
          yaxis: { title: { text: safe(label) } },
        },
      };
    });
  }
}

if (DATA.mosaics) {
  chart("mosaics", () => {
    const found = DATA.mosaics;
    const x = found.sites.map((_, i) => i);
    const dots = { x: [], y: [], text: [] };
    found.tasks.forEach((values, task) =>
      values.forEach((value, s) => {
        dots.x.push(s + (((task * 7) % 11) - 5) / 40);
        dots.y.push(value);
        dots.text.push(safe(found.task_names[task]));
      }),
    );
    const traces = [];
    if (dots.x.length) {
      traces.push({ ...dots, type: "scatter", mode: "markers", name: "one class", marker: { color: GREY, size: 4, opacity: 0.7 }, hovertemplate: "%{text}: %{y:.3f}<extra></extra>" });
    }
    traces.push(...banded(`mean of ${whole(found.n)} mosaics, 95 % interval`, x, found.excess, found.low, found.high, palette(0), { hovertemplate: "%{y:.3f}<extra></extra>" }));
    return { traces, layout: { xaxis: siteTicks(found.sites), yaxis: { title: { text: "hit − 0.25" } } } };
  });
}

if (DATA.history) {
  DATA.history.quantities.forEach((quantity, i) => {
    byId("learning-charts").append(
      element("figure", { class: "chart", id: `chart-learning-${i}`, role: "group", "aria-label": `Learning curve: ${quantity.name}` }),
    );
    chart(`learning-${i}`, () => {
      const paint = colours();
      const x = DATA.history.steps;
      const lines = { mode: "lines", hovertemplate: "step %{x}: %{y:.3g}<extra></extra>" };
      const traces = TASKS.length > 1 ? banded("mean over classes", x, quantity.mean, quantity.low, quantity.high, GREY, lines) : [];
      const chosen = [["A", state.a, paint.a]];
      if (state.b !== null) chosen.push(["B", state.b, paint.b]);
      for (const [slot, task, colour] of chosen) {
        if (quantity.tasks[task]) traces.push(...banded(`${slot}: ${cut(TASKS[task])}`, x, quantity.tasks[task], null, null, colour, lines));
      }
      return {
        height: 300, traces,
        layout: { xaxis: { title: { text: "step" } }, yaxis: { title: { text: safe(quantity.name.replaceAll("_", " ")) } } },
      };
    });
  });
}

onChange(() => refresh([...charts.keys()].filter((id) => id === "chart-depth" || id.startsWith("chart-learning"))));
