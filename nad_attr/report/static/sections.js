// What else follows the chosen class: nearest classes, error examples, cards of channels.

function nearest() {
  const place = byId("nearest");
  if (!place || !OVERLAPS) return;
  const buttons = OVERLAPS.nearest[state.a].map(([task, kappa]) =>
    element(
      "button",
      { type: "button", onclick: () => compare(state.a, task), "aria-label": `Compare with ${TASKS[task]}, kappa ${decimals(kappa)}` },
      `${cut(TASKS[task], 30)} ${decimals(kappa)}`,
    ),
  );
  place.replaceChildren(
    element("p", { class: "quiet" }, "Most alike to ", element("b", {}, TASKS[state.a]), ", with kappa; a press compares:"),
    element("div", { class: "buttons" }, ...buttons),
  );
}

function examples() {
  const place = byId("examples");
  if (!place || !DATA.errors) return;
  for (const found of DATA.errors.examples) {
    const [right, called] = [TASKS[found.right], TASKS[found.called]];
    if (right === undefined || called === undefined) continue;
    const inside = { "whole network": "in the whole network", "of the right class": `inside ${right}'s sub-architecture`, "of the called class": `inside ${called}'s` };
    const outputs = Object.entries(found.logits)
      .map(([name, [y, other]]) => `${decimals(y, 1)} against ${decimals(other, 1)} ${inside[name] || name}`)
      .join(", ");
    place.append(
      element(
        "article", { class: "example" },
        ALBUM[found.picture] ? picture(found.picture, `An image of ${right}`) : element("span"),
        element(
          "div", {},
          element("p", {}, "Called ", element("em", {}, called), " instead of ", element("em", {}, right),
            `: of ${whole(found.n_others)} other classes, it is number ${found.rank} in similarity to the right one (kappa ${decimals(found.kappa)}). ` +
            `The two share ${whole(found.shared)} of the ${whole(found.either)} channels that either keeps, most beyond chance at ${found.best_site}.`),
          element("p", { class: "quiet" }, `Output for ${right} against ${called}: ${outputs}.`),
          element("button", { type: "button", onclick: () => compare(found.right, found.called) }, "Compare the two"),
        ),
      ),
    );
  }
}

const FIRST_CARDS = 24;
let moreCards = FIRST_CARDS;
let cardSite = "";

function cards() {
  const place = byId("channel-cards");
  if (!place) return;
  if (!place.firstChild) {
    const select = element("select", { id: "card-site", onchange: () => { cardSite = select.value; moreCards = FIRST_CARDS; cards(); } });
    select.append(element("option", { value: "" }, "all sites"));
    SITES.forEach((site, s) => select.append(element("option", { value: s }, site.name)));
    // What lies deepest is nearest to the class.
    cardSite = String(SITES.length - 1);
    select.value = cardSite;
    const task = element("select", { id: "card-task", onchange: () => choose(Number(task.value), state.b) });
    TASKS.forEach((name, t) => task.append(element("option", { value: t }, cut(name, 40))));
    const chosen = element("label", { class: "inline" }, "Class ", task);
    place.append(element("div", { class: "row" }, chosen, element("label", { class: "inline" }, "Site ", select)), element("p", { class: "quiet" }), element("div", { class: "cards" }), element("div", { class: "more" }));
  }
  byId("card-task").value = state.a;
  const row = levels(state.a);
  const sites = cardSite === "" ? SITES.map((_, s) => s) : [Number(cardSite)];
  const kept = [];
  for (const s of sites) {
    const site = SITES[s];
    for (let c = 0; c < site.channels; c++) if (isKept(row[site.start + c])) kept.push([s, c, row[site.start + c]]);
  }
  kept.sort((x, y) => y[2] - x[2] || x[0] - y[0] || x[1] - y[1]);
  const [, note, grid, more] = place.children;
  note.textContent = `${TASKS[state.a]} keeps ${whole(kept.length)} channel${kept.length === 1 ? "" : "s"} here.`;
  grid.replaceChildren(
    ...kept.slice(0, moreCards).map(([s, c, level]) => {
      const i = SITES[s].start + c;
      const pictures = picturesOf(i);
      return element(
        "article", { class: "card" },
        element("b", {}, `${SITES[s].name}, channel ${c}`), ` gate ${decimals(gateOf(level))}`,
        conceptOf(i) ? element("div", {}, conceptOf(i)) : null,
        pictures.length
          ? element("div", {}, ...pictures.map((number, k) => picture(number, `Image number ${k + 1} of those that the channel responds to most`)))
          : TOP ? element("div", { class: "quiet" }, "responds to no image") : null,
      );
    }),
  );
  more.replaceChildren();
  if (kept.length > moreCards) {
    more.append(element("button", { type: "button", onclick: () => { moreCards += 96; cards(); } }, `Show more of ${whole(kept.length - moreCards)}`));
  }
}

onChange(nearest);
onChange(() => {
  moreCards = FIRST_CARDS;
  cards();
});
