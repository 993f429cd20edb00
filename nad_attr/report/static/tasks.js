// The list of classes: search, order, choice; and what is said of the chosen ones.

const list = byId("tasks");
let rows = [];
let active = -1;

const VALUES = { size: TASKS.map((_, task) => keptIn(task) / CHANNELS) };
if (DATA.evaluation) {
  for (const [name, values] of Object.entries(DATA.evaluation.values)) if (name !== "size") VALUES[name] = values;
}
const shown = (name, value) =>
  value === null || value === undefined ? "–" : name === "size" ? percent(value) : decimals(value);

function fillOrders() {
  const options = [["number", "as in the file"], ["name", "by name"]];
  for (const name of Object.keys(VALUES)) {
    const text = DATA.measures[name] || name;
    options.push([`${name} down`, `${text}, highest first`], [`${name} up`, `${text}, lowest first`]);
  }
  byId("order").replaceChildren(...options.map(([value, text]) => element("option", { value }, text)));
}

function build() {
  const [measure, direction] = byId("order").value.split(" ");
  const wanted = byId("search").value.trim().toLowerCase();
  const names = TASKS.map((name) => name.toLowerCase());
  let found = TASKS.map((_, task) => task);
  if (wanted) found = found.filter((task) => names[task].includes(wanted) || DATA.indices[task] === wanted);
  const values = VALUES[measure];
  if (measure === "name") found.sort((i, j) => names[i].localeCompare(names[j]));
  else if (values) {
    const sign = direction === "down" ? -1 : 1;
    const key = (task) => (values[task] === null ? Infinity : sign * values[task]);
    found.sort((i, j) => key(i) - key(j) || i - j);
  }
  const column = values ? measure : VALUES.own_auc ? "own_auc" : "size";
  rows = found;
  list.replaceChildren(
    ...found.map((task, place) =>
      element(
        "div",
        { class: "task", role: "option", id: `task-${task}`, "data-place": place, "aria-selected": "false" },
        element("span", { class: "mark", "aria-hidden": "true" }),
        element("span", { title: TASKS[task] }, TASKS[task]),
        element("span", { title: DATA.measures[column] || column }, shown(column, VALUES[column][task])),
      ),
    ),
  );
  const what = DATA.measures[column] || column;
  byId("found").textContent = found.length === TASKS.length
    ? `${whole(found.length)} classes, with ${what}`
    : `${whole(found.length)} of ${whole(TASKS.length)} classes`;
  activate(Math.max(0, rows.indexOf(state.a)), false);
  mark();
}

function activate(place, scroll = true) {
  const before = list.querySelector(".active");
  if (before) before.classList.remove("active");
  active = Math.max(0, Math.min(rows.length - 1, place));
  const row = list.children[active];
  if (!row) {
    list.removeAttribute("aria-activedescendant");
    return;
  }
  row.classList.add("active");
  list.setAttribute("aria-activedescendant", row.id);
  if (scroll) {
    const [top, bottom] = [row.offsetTop, row.offsetTop + row.offsetHeight];
    if (top < list.scrollTop) list.scrollTop = top;
    else if (bottom > list.scrollTop + list.clientHeight) list.scrollTop = bottom - list.clientHeight;
  }
}

function mark() {
  for (const row of list.querySelectorAll(".is-a, .is-b")) {
    row.classList.remove("is-a", "is-b");
    row.setAttribute("aria-selected", "false");
    row.firstElementChild.textContent = "";
  }
  for (const [slot, task] of [["a", state.a], ["b", state.b]]) {
    const row = task === null ? null : byId(`task-${task}`);
    if (!row) continue;
    row.classList.add(`is-${slot}`);
    row.setAttribute("aria-selected", "true");
    row.firstElementChild.textContent = slot.toUpperCase();
  }
  byId("name-a").textContent = TASKS[state.a];
  byId("name-b").textContent = state.b === null ? "compare with …" : TASKS[state.b];
  for (const id of ["swap", "single"]) byId(id).disabled = state.b === null;
  byId("slot-b").disabled = TASKS.length < 2;
}

function setSlot(slot) {
  state.slot = slot;
  for (const other of ["a", "b"]) {
    byId(`slot-${other}`).setAttribute("aria-checked", String(other === slot));
    byId(`slot-${other}`).tabIndex = other === slot ? 0 : -1;
  }
}

function pick(task, slot = state.slot) {
  if (slot === "b" && task !== state.a) choose(state.a, task);
  else if (slot === "a") choose(task, task === state.b ? null : state.b);
}

/** The chosen classes in words. */
function describe() {
  const a = state.a;
  const kept = keptIn(a);
  const of = (name) => (VALUES[name] ? VALUES[name][a] : null);
  const parts = [element("b", {}, TASKS[a]), ` keeps ${whole(kept)} of ${whole(CHANNELS)} channels (${percent(kept / CHANNELS)})`];
  if (DATA.evaluation && of("own_auc") !== null && of("own_auc") !== undefined) {
    const random = DATA.evaluation.random_auc ? ` (random channels ${decimals(DATA.evaluation.random_auc[a])})` : "";
    parts.push(`: own AUC ${decimals(of("own_auc"))}${random}, fidelity ${decimals(of("fidelity"))}, recall ${decimals(of("recall"))} at FPR ${decimals(of("fpr"))}, BA ${decimals(of("ba"))}`);
  }
  parts.push(". ");
  if (state.b !== null) {
    const sites = shared(a, state.b);
    const both = sites.reduce((sum, site) => sum + site.both, 0);
    const either = keptIn(a) + keptIn(state.b) - both;
    parts.push(
      "It shares ", element("b", {}, whole(both)), ` of the ${whole(either)} channels that either keeps with `,
      element("b", {}, TASKS[state.b]), `: overlap ${decimals(mean(sites.map((s) => s.overlap)))}, beyond chance (kappa) `,
      element("span", { id: "kappa" }, decimals(mean(sites.map((s) => s.kappa)), 3)), ".",
    );
  }
  byId("chosen").replaceChildren(...parts);
}

list.addEventListener("click", (event) => {
  const row = event.target.closest(".task");
  if (!row) return;
  activate(Number(row.dataset.place), false);
  pick(rows[active], event.shiftKey ? "b" : state.slot);
});
list.addEventListener("keydown", (event) => {
  const page = Math.max(1, Math.floor(list.clientHeight / 28) - 1);
  const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -rows.length, End: rows.length };
  if (event.key in steps) {
    event.preventDefault();
    activate(active + steps[event.key]);
  } else if ((event.key === "Enter" || event.key === " ") && rows.length) {
    event.preventDefault();
    pick(rows[active], event.shiftKey ? "b" : state.slot);
  }
});
byId("search").addEventListener("input", build);
byId("search").addEventListener("keydown", (event) => {
  if (event.key === "ArrowDown") {
    event.preventDefault();
    list.focus();
  } else if (event.key === "Enter" && rows.length) {
    event.preventDefault();
    pick(rows[0], event.shiftKey ? "b" : state.slot);
  }
});
byId("order").addEventListener("change", build);
for (const slot of ["a", "b"]) {
  byId(`slot-${slot}`).addEventListener("click", () => setSlot(slot));
  byId(`slot-${slot}`).addEventListener("keydown", (event) => {
    if (!event.key.startsWith("Arrow")) return;
    event.preventDefault();
    const other = slot === "a" ? "b" : "a";
    if (byId(`slot-${other}`).disabled) return;
    setSlot(other);
    byId(`slot-${other}`).focus();
  });
}
byId("swap").addEventListener("click", () => state.b !== null && choose(state.b, state.a));
byId("single").addEventListener("click", () => {
  setSlot("a");
  choose(state.a, null);
});
onChange(mark);
onChange(describe);
