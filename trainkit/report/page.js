"use strict";
// A number as the axes show it.
const show = v => { const a = Math.abs(v); return a >= 1e9 ? +(v / 1e9).toPrecision(4) + "G" : a >= 1e6 ? +(v / 1e6).toPrecision(4) + "M" : a >= 1e4 ? +(v / 1e3).toPrecision(4) + "k" : String(+v.toPrecision(4)); };
// Index of the point of the ascending `xs` that is nearest to `x`.
const nearest = (xs, x) => {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) { const mid = (low + high) >> 1; if (xs[mid] <= x) low = mid; else high = mid; }
  return Math.abs(xs[high] - x) < Math.abs(xs[low] - x) ? high : low;
};
for (const figure of document.querySelectorAll("figure.chart")) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const out = figure.querySelector("output"), cursor = figure.querySelector(".cursor"), line = cursor.firstElementChild;
  const scale = data.log ? Math.log10 : v => v, back = data.log ? v => 10 ** v : v => v;
  const from = scale(data.from), to = scale(data.to);
  let place = 0;
  const move = share => {
    place = Math.min(1, Math.max(0, share));
    const x = back(from + place * (to - from));
    const found = data.series.filter(s => s.x.length).map(s => { const i = nearest(s.x, x); return (s.name || "value") + " " + show(s.y[i]) + (s.x[i] === x ? "" : " at " + show(s.x[i])); });
    out.textContent = data.x + " " + show(x) + (found.length ? ": " + found.join(", ") : "");
    line.style.left = 100 * place + "%"; line.style.visibility = "visible";
    cursor.setAttribute("aria-valuenow", Math.round(1000 * place)); cursor.setAttribute("aria-valuetext", out.textContent);
  };
  cursor.addEventListener("pointermove", e => { const box = cursor.getBoundingClientRect(); move((e.clientX - box.left) / box.width); });
  cursor.addEventListener("focus", () => move(place));
  cursor.addEventListener("keydown", e => {
    const step = { ArrowRight: .01, ArrowUp: .01, ArrowLeft: -.01, ArrowDown: -.01, PageUp: .1, PageDown: -.1 }[e.key];
    if (step !== undefined) move(place + step); else if (e.key === "Home") move(0); else if (e.key === "End") move(1); else return;
    e.preventDefault();
  });
  for (const mark of figure.querySelectorAll(".mark"))
    for (const event of ["pointerenter", "focus", "click"]) mark.addEventListener(event, () => { out.textContent = mark.getAttribute("aria-label"); });
}
for (const box of document.querySelectorAll(".network")) {
  const data = JSON.parse(box.querySelector("script").textContent);
  const lines = box.querySelectorAll("line"), out = box.querySelector("output");
  const tree = box.querySelector("select"), moment = box.querySelector("input");
  const light = (links, root, text) => {
    lines.forEach((line, at) => line.classList.toggle("used", links.includes(at)));
    for (const node of box.querySelectorAll("[data-node]")) node.classList.toggle("root", node.dataset.node === root);
    out.textContent = text;
  };
  tree.addEventListener("change", () => {
    const one = data.trees[tree.value];
    moment.value = 0;
    one ? light(one.links, one.root, one.text + ": " + one.links.length + " links") : light([], null, "");
  });
  moment.addEventListener("input", () => {
    const one = data.moments[moment.value - 1];
    tree.value = "";
    one ? light(one.links, null, "moment " + moment.value + " of " + data.moments.length + "\n" + one.text.join("\n")) : light([], null, "");
  });
}
