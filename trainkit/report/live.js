"use strict";
// Counters that grow, once a second, as lines of what each second brought; rows as a table. Text stays text.
const KEPT = 120, seen = [], box = document.getElementById("live"), said = document.getElementById("said");
const short = v => { const a = Math.abs(v); return a >= 1e9 ? +(v / 1e9).toPrecision(3) + "G" : a >= 1e6 ? +(v / 1e6).toPrecision(3) + "M" : a >= 1e4 ? +(v / 1e3).toPrecision(3) + "k" : String(+v.toPrecision(3)); };
const make = (tag, kind, text) => { const e = document.createElement(tag); if (kind) e.className = kind; if (text !== undefined) e.textContent = text; return e; };
const SVG = "http://www.w3.org/2000/svg";
function tile(name) {
  const tile = make("section", "tile"), svg = document.createElementNS(SVG, "svg"), path = document.createElementNS(SVG, "path");
  tile.append(make("h2", "", name), make("p", "number", "-"), svg);
  svg.setAttribute("viewBox", "0 0 1000 1000"); svg.setAttribute("preserveAspectRatio", "none"); svg.setAttribute("aria-hidden", "true");
  path.setAttribute("class", "line c0"); svg.append(path); box.append(tile);
  return { number: tile.querySelector(".number"), path };
}
const tiles = {};
function show(data) {
  seen.push(data); if (seen.length > KEPT + 1) seen.shift();
  for (const name of Object.keys(data.counters)) {
    const to = tiles[name] ??= tile(name.replaceAll("_", " "));
    const rates = seen.slice(1).map((now, at) => (now.counters[name] - seen[at].counters[name]) / Math.max(1e-3, now.time - seen[at].time));
    to.number.textContent = (rates.length ? short(rates.at(-1)) : "-") + " a second, " + short(data.counters[name]) + " in all";
    const high = Math.max(1e-9, ...rates);
    to.path.setAttribute("d", rates.map((rate, at) => (at ? "L" : "M") + 1000 * at / KEPT + " " + (1000 - 960 * rate / high)).join(""));
  }
  const body = document.querySelector("#rows tbody"); body.replaceChildren();
  for (const row of data.rows) { const line = make("tr"); row.forEach((cell, at) => line.append(make(at ? "td" : "th", "", String(cell)))); line.firstChild.scope = "row"; body.append(line); }
  document.getElementById("none").hidden = data.rows.length > 0;
}
const source = new EventSource("events");
source.onmessage = event => { said.textContent = ""; show(JSON.parse(event.data)); };
source.onerror = () => { said.textContent = "Not connected; trying again."; };
