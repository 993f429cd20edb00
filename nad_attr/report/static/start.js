// Everything is there: show it.

function navigation() {
  const items = [...document.querySelectorAll("main > section")].map((section) =>
    element("li", {}, element("a", { href: `#${section.id}` }, section.dataset.short || section.querySelector("h2").textContent)),
  );
  byId("nav").replaceChildren(element("ul", {}, ...items));
}

byId("theme").addEventListener("click", () => {
  const turn = { system: "dark", dark: "light", light: "system" };
  setTheme(turn[state.theme]);
});
DARK.addEventListener("change", themeChanged);

let waiting = null;
window.addEventListener("resize", () => {
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(() => {
    arrange();
    draw();
  });
});

// Printed, everything is there, in light colours.
window.addEventListener("beforeprint", () => {
  printing = true;
  document.querySelectorAll("details").forEach((details) => details.setAttribute("open", ""));
  document.querySelectorAll('img[loading="lazy"]').forEach((image) => image.setAttribute("loading", "eager"));
  cursor = null;
  arrange();
  draw();
  for (const id of charts.keys()) safely(() => render(id));
});
window.addEventListener("afterprint", () => {
  printing = false;
  arrange();
  themeChanged();
});

navigation();
fillOrders();
arrange();
redraw();
setSlot("a");
build();
describe();
performance.mark("nad-attr-shown");
for (const part of [examples, nearest, cards, startFlow]) safely(part);
// The charts wait until the first sight of the page is on the screen.
// The library of the charts stands at the end of the page, which may not be there yet.
requestAnimationFrame(() => setTimeout(() => {
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", watch);
  else watch();
}, 0));
document.documentElement.setAttribute("data-ready", "true");
