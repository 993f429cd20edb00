// Information flow: a column for each site, a node for each channel, a link for each flow.

const FLOW = DATA.flow;
const flowState = { tasks: [], chosen: null };
const svgElement = (tag, attributes = {}, ...children) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null) made.setAttribute(name, value);
  made.append(...children);
  return made;
};
const signed = (value) => (value === null ? "–" : `${value < 0 ? "−" : "+"}${Number(Math.abs(value).toPrecision(2))}`);

/** What a node of a site is; files of earlier versions do not say. */
const unitOf = (site) => (FLOW.units || [])[site] || "channel";

function nodeName(node) {
  const { site, channel, n } = FLOW.nodes[node];
  if (site === FLOW.sites.length - 1) return "the output";
  const unit = unitOf(site);
  return channel < 0 ? `${whole(n)} other ${unit}s of ${FLOW.sites[site]}` : `${unit} ${channel} of ${FLOW.sites[site]}`;
}

/** The number of a node's channel among all channels of the page, or nothing; groups of channels, as heads are, have none. */
function channelOf(node) {
  const { site, channel } = FLOW.nodes[node];
  const found = SITES.find(({ name }) => name === FLOW.sites[site]);
  if (["head", "group"].includes(unitOf(site))) return null;
  return found && channel >= 0 ? found.start + channel : null;
}

const flowLinks = () => FLOW.links.filter(({ task }) => flowState.tasks.includes(task));

/** All links through which something reaches a node, or leaves it. */
function traced(node) {
  const links = flowLinks();
  const found = new Set();
  for (const [near, far] of [["to", "from"], ["from", "to"]]) {
    const reached = new Set([node]);
    const ordered = [...links].sort((a, b) => FLOW.nodes[a[near]].site - FLOW.nodes[b[near]].site);
    if (near === "to") ordered.reverse();
    for (const link of ordered) {
      if (!reached.has(link[near])) continue;
      // Forwards only the next step: nearly everything leads on to the output.
      if (near === "from" && link[near] !== node) continue;
      found.add(link);
      if (near === "to") reached.add(link[far]);
    }
  }
  return found;
}

function drawFlow() {
  const place = byId("flow-scroll");
  const n = FLOW.sites.length;
  const columns = FLOW.sites.map((_, s) => FLOW.nodes.map((node, i) => ({ ...node, i })).filter(({ site }) => site === s));
  const most = Math.max(...columns.map((column) => column.length));
  const row = 30;
  const available = place.clientWidth - 4;
  const upright = Math.max(...FLOW.sites.map((name) => 6.6 * Math.min(26, name.length))) > Math.max(92, available / n) - 8;
  // A slanted name begins left of its column.
  const margin = upright ? 70 : 0;
  const step = Math.max(92, (available - margin) / n);
  const width = margin + step * n;
  const bottom = upright ? 120 : 34;
  const height = most * row + bottom + 12;
  const x = (node) => margin + (FLOW.nodes[node].site + 0.5) * step;
  const y = new Map();
  columns.forEach((column) => column.forEach(({ i }, k) => y.set(i, 16 + (k + (most - column.length) / 2) * row)));
  const links = flowLinks();
  const largest = new Map();
  // Outputs of two classes have no common unit: each is drawn against its own largest.
  const hop = ({ task, from, to }) => `${task} ${FLOW.nodes[from].site} ${FLOW.nodes[to].site}`;
  for (const link of links) {
    const single = FLOW.nodes[link.from].channel >= 0 && FLOW.nodes[link.to].channel >= 0;
    largest.set(hop(link), Math.max(largest.get(hop(link)) || 1e-300, single ? Math.abs(link.flow) : 0));
  }
  const lit = flowState.chosen === null ? null : traced(flowState.chosen);
  const litNodes = lit && new Set([flowState.chosen, ...[...lit].flatMap(({ from, to }) => [from, to])]);
  const picture = svgElement("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": `Flow between ${n - 1} sites, ${flowState.tasks.map((t) => FLOW.tasks[t]).join(" and ")}` });
  const strengthOf = (link) => Math.min(1, Math.abs(link.flow) / largest.get(hop(link)));
  for (const link of [...links].sort((a, b) => strengthOf(a) - strengthOf(b))) {
    const strength = strengthOf(link);
    const slot = flowState.tasks.indexOf(link.task);
    const shift = flowState.tasks.length > 1 ? 4 * (slot - 0.5) : 0;
    const [x0, x1, y0, y1] = [x(link.from), x(link.to), y.get(link.from) + shift, y.get(link.to) + shift];
    const middle = (x0 + x1) / 2;
    picture.append(svgElement("path", {
      d: `M${x0} ${y0}C${middle} ${y0} ${middle} ${y1} ${x1} ${y1}`,
      class: `t${slot}${lit && !lit.has(link) ? " faint" : ""}`,
      "stroke-width": (0.6 + 6 * strength).toFixed(2),
      "stroke-opacity": lit && lit.has(link) ? 0.95 : (0.25 + 0.55 * strength).toFixed(2),
      "stroke-dasharray": link.flow < 0 ? "7 5" : null,
    }));
  }
  columns.forEach((column) => {
    const sizes = column.map(({ effect }) => Math.max(...flowState.tasks.map((t) => Math.abs(effect[t]))));
    const single = sizes.filter((_, k) => column[k].channel >= 0);
    const top = Math.max(...(single.length ? single : sizes), 1e-300);
    column.forEach(({ i, channel, n: count, site, effect }, k) => {
      const r = 3.5 + 6 * Math.sqrt(Math.min(1, sizes[k] / top));
      const shape = channel < 0
        ? svgElement("rect", { x: x(i) - r, y: y.get(i) - r, width: 2 * r, height: 2 * r })
        : svgElement("circle", { cx: x(i), cy: y.get(i), r });
      const said = `${nodeName(i)}: effect ${flowState.tasks.map((t) => `${signed(effect[t])} on ${FLOW.tasks[t]}`).join(", ")}`;
      const label = site === n - 1 ? "" : channel < 0 ? `${whole(count)} more` : channel;
      const node = svgElement("g", {
        class: `node${flowState.chosen === i ? " chosen" : ""}${litNodes && !litNodes.has(i) ? " faint" : ""}`,
        tabindex: i === (flowState.chosen ?? 0) ? 0 : -1, role: "button", "aria-pressed": String(flowState.chosen === i),
        "aria-label": said, "data-node": i,
      }, svgElement("title", {}, said), shape,
      svgElement("text", { x: x(i) + r + 3, y: y.get(i) + 4, class: "halo" }, String(label)));
      node.addEventListener("click", () => chooseNode(flowState.chosen === i ? null : i, i));
      picture.append(node);
    });
  });
  FLOW.sites.forEach((name, s) => {
    const [left, top] = [margin + (s + 0.5) * step, most * row + 22];
    picture.append(svgElement("text", upright
      ? { class: "site", transform: `translate(${left + 4} ${top}) rotate(-38)`, "text-anchor": "end" }
      : { class: "site", x: left, y: top + 8, "text-anchor": "middle" }, shortened(name)));
  });
  const scrolled = place.scrollLeft;
  place.replaceChildren(picture);
  place.scrollLeft = scrolled;
  const more = byId("flow-more");
  more.hidden = width <= place.clientWidth;
  more.textContent = `The picture is wider than the page: ${n - 1} sites. Scroll sideways, or walk through it with the arrow keys.`;
}

function chooseNode(node, focused = node) {
  flowState.chosen = node;
  drawFlow();
  sayFlow();
  const at = focused === null ? null : byId("flow-scroll").querySelector(`[data-node="${focused}"]`);
  if (at) at.focus({ preventScroll: true });
}

function sayFlow() {
  const place = byId("flow-said");
  const node = flowState.chosen;
  if (node === null) {
    place.replaceChildren(element("p", { class: "quiet" }, "Nothing is traced. The area of a node says how large a channel's effect is, the width of a link how much flows, both within their column, and links within their class."));
    return;
  }
  const { effect } = FLOW.nodes[node];
  const made = [element("p", {}, element("b", {}, nodeName(node)), `: effect ${flowState.tasks.map((t) => `${signed(effect[t])} on ${FLOW.tasks[t]}`).join(", ")}`)];
  const channel = channelOf(node);
  if (channel !== null) {
    const concept = conceptOf(channel);
    if (concept) made.push(element("p", { class: "quiet" }, concept));
    const images = picturesOf(channel);
    if (images.length) made.push(element("p", {}, ...images.slice(0, 5).map((number) => picture(number, ""))));
  }
  const list = (links, end, heading) => {
    if (!links.length) return;
    links.sort((a, b) => Math.abs(b.flow) - Math.abs(a.flow));
    made.push(element("p", { class: "quiet" }, heading), element("ul", {}, ...links.slice(0, 12).map((link) => {
      const of = flowState.tasks.length > 1 ? ` (${FLOW.tasks[link.task]})` : "";
      const straight = link.straight ? `, straight part ${signed(link.straight)}` : "";
      const concept = channelOf(link[end]) === null ? "" : conceptOf(channelOf(link[end]));
      return element("li", {}, `${nodeName(link[end])} ${signed(link.flow)}${of}${straight}${concept ? `; ${concept}` : ""}`);
    })));
  };
  const links = flowLinks();
  list(links.filter(({ to }) => to === node), "from", "Fed by, of the links drawn:");
  list(links.filter(({ from }) => from === node), "to", "Feeds:");
  place.replaceChildren(...made);
}

function flowTasks() {
  // The classes chosen above, if their flow is known; else the first.
  const known = [state.a, state.b].filter((task) => task !== null).map((task) => FLOW.tasks.indexOf(TASKS[task])).filter((t) => t >= 0);
  flowState.tasks = known.length ? [...new Set(known)] : [0];
  buildFlow();
}

function buildFlow() {
  const select = (slot) => {
    const made = element("select", { "aria-label": slot ? "Second class of the flow" : "Class of the flow" });
    if (slot) made.append(element("option", { value: "" }, "none"));
    FLOW.tasks.forEach((name, t) => {
      if (!slot || t !== flowState.tasks[0]) made.append(element("option", { value: t }, name));
    });
    made.value = slot && flowState.tasks.length < 2 ? "" : String(flowState.tasks[slot]);
    made.addEventListener("change", () => {
      const [first, second] = flowState.tasks;
      const chosen = made.value === "" ? null : Number(made.value);
      flowState.tasks = (slot ? [first, chosen] : [chosen, second === chosen ? null : second]).filter((t) => t !== null && t !== undefined);
      buildFlow();
    });
    return element("label", { class: "inline" }, element("span", { class: `swatch ${slot ? "b" : "a"}` }), slot ? " over it " : " Flow of ", made);
  };
  byId("flow-tasks").replaceChildren(select(0), ...(FLOW.tasks.length > 1 ? [select(1)] : []));
  drawFlow();
  sayFlow();
}

function startFlow() {
  if (!FLOW || !byId("flow-scroll")) return;
  byId("flow-legend").replaceChildren(
    element("span", {}, element("i", { class: "line-sign" }), "speaks for the class"),
    element("span", {}, element("i", { class: "line-sign against" }), "speaks against it"),
  );
  byId("flow-scroll").addEventListener("keydown", (event) => {
    const at = event.target.closest("[data-node]");
    if (!at) return;
    const here = Number(at.dataset.node);
    const { site } = FLOW.nodes[here];
    const column = (s) => FLOW.nodes.map((node, i) => [node.site, i]).filter(([own]) => own === s).map(([, i]) => i);
    const place = column(site).indexOf(here);
    let next = null;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") next = column(site)[place + (event.key === "ArrowDown" ? 1 : -1)];
    else if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
      const other = column(site + (event.key === "ArrowRight" ? 1 : -1));
      next = other[Math.min(place, other.length - 1)];
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      chooseNode(flowState.chosen === here ? null : here, here);
      return;
    } else if (event.key === "Escape") {
      chooseNode(null, here);
      return;
    } else return;
    event.preventDefault();
    if (next === undefined || next === null) return;
    at.setAttribute("tabindex", -1);
    const target = byId("flow-scroll").querySelector(`[data-node="${next}"]`);
    target.setAttribute("tabindex", 0);
    target.focus();
  });
  flowTasks();
  onChange(flowTasks);
  window.addEventListener("resize", () => requestAnimationFrame(drawFlow));
  window.addEventListener("beforeprint", drawFlow);
}
