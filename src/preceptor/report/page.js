// All of the page can be read without this script. It reads out plots and tokens under the pointer, hides and shows
// curves and answers, and unfolds what is folded before the page is printed.

const number = value => {
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return size !== 0 && size < 0.001 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
};

function nearest(values, x) {
  let low = 0, high = values.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (values[middle] <= x) low = middle; else high = middle;
  }
  return Math.abs(values[low] - x) <= Math.abs(values[high] - x) ? low : high;
}

// kept: what the reader has chosen in the plot that this one replaces (watch.js), as `figure.kept()` gives it.
function readOut(figure, kept) {
  const plot = JSON.parse(figure.querySelector("script").textContent), hidden = new Set();
  const canvas = figure.querySelector(".canvas"), readout = figure.querySelector(".readout");
  const [left, top, width, height] = plot.box, [x0, x1] = plot.x, [y0, y1] = plot.y;
  const across = x => left + width * (x - x0) / (x1 - x0);
  const scaled = y => plot.log ? Math.log10(y) : y;
  const down = y => top + height * (1 - (scaled(y) - scaled(y0)) / (scaled(y1) - scaled(y0)));
  const longest = plot.series.reduce((best, series) => series.x.length > best.length ? series.x : best, []);
  const idle = readout.firstElementChild;
  let at = null;

  function clear() {
    at = null;
    canvas.querySelectorAll(".cross, .dot").forEach(element => element.remove());
    readout.replaceChildren(idle);
  }
  function mark(x) {
    clear();
    readout.replaceChildren();
    at = x;
    const cross = make("div", "cross");
    cross.style.cssText = `left:${100 * across(x)}%;top:${100 * top}%;height:${100 * height}%`;
    canvas.append(cross);
  }
  function show(x) {
    if (plot.bars) {
      const [edges, counts] = plot.bars, bin = edges.findIndex((edge, index) => x >= edge && x < edges[index + 1]);
      if (bin < 0) return clear();
      mark((edges[bin] + edges[bin + 1]) / 2);
      const last = edges[bin + 1] - 1;
      readout.textContent = `${number(edges[bin])}${last > edges[bin] ? " to " + number(last) : ""} ${plot.x_label}: ${number(counts[bin])}`;
      return;
    }
    if (!longest.length) return;
    const exact = longest[nearest(longest, x)];
    mark(exact);
    readout.append(make("b", "", `${plot.x_label} ${number(exact)}`));
    plot.series.forEach((series, index) => {
      if (hidden.has(index)) return;
      const place = nearest(series.x, exact), away = series.x[place] !== exact;
      const ends = series.y_ends && series.y_ends[place] ? ` (${series.y_ends[place].map(number).join(" to ")})` : "";
      const value = `${series.name} ${number(series.y[place])}${ends}${away ? ` (${plot.x_label} ${number(series.x[place])})` : ""}`;
      readout.append(" · ", value);
      const dot = make("div", "dot");
      dot.style.cssText = `left:${100 * across(series.x[place])}%;top:${100 * down(series.y[place])}%;background:var(--c${series.colour})`;
      canvas.append(dot);
    });
  }
  function point(event) {
    const box = canvas.getBoundingClientRect();
    show(x0 + ((event.clientX - box.left) / box.width - left) / width * (x1 - x0));
  }
  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("pointerdown", point);
  canvas.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") clear(); });
  canvas.addEventListener("keydown", event => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") clear();
    if (!by) return;
    const places = plot.bars ? plot.bars[0].slice(0, -1) : longest;
    const now = at === null ? -1 : nearest(places, at - (plot.bars ? (places[1] - places[0]) / 2 || 0 : 0));
    show(places[Math.min(Math.max(now + by, 0), places.length - 1)]);
    event.preventDefault();
  });
  const names = [...figure.querySelectorAll(".legend [data-series]")];
  if (names.length > 1) names.forEach((name, index) => {
    const button = make("button");
    button.type = "button";
    button.append(...name.childNodes);
    button.setAttribute("aria-pressed", "true");
    function toggle() {
      const show = hidden.delete(index) || !hidden.add(index);
      button.setAttribute("aria-pressed", String(show));
      for (const line of figure.querySelectorAll(`[id*="-series-${name.dataset.series}-"]`)) line.style.display = show ? "" : "none";
      clear();
    }
    button.addEventListener("click", toggle);
    name.replaceWith(button);
    if (kept && kept.hidden.includes(index)) toggle();
  });
  figure.kept = () => ({ hidden: [...hidden], at });
  if (kept && kept.at !== null) show(kept.at);
}
document.querySelectorAll("figure").forEach(figure => readOut(figure));

// Tokens ------------------------------------------------------------------------------------------------------------

const aside = document.getElementById("token");
let chosen = null;
function choose(token) {
  if (chosen) chosen.classList.remove("chosen");
  chosen = token;
  aside.hidden = !token;
  if (!token) return;
  token.classList.add("chosen");
  aside.replaceChildren();
  if (token.dataset.about) { aside.textContent = token.dataset.about; return; }
  const ids = token.dataset.ids, trained = token.closest(".segment").classList.contains("target");
  aside.append(make("b", "", trained ? "trained" : "read"), " · " + (ids.includes(" ") ? "tokens " + ids + ", together one character" : "token " + ids)
    + " · place " + token.dataset.place + (token.classList.contains("special") ? " · special: it acts" : ""));
}
const tokenOf = event => event.target.closest(".t[data-ids], .t[data-about]");
document.addEventListener("pointerover", event => { if (event.pointerType === "mouse" && tokenOf(event) !== chosen) choose(tokenOf(event)); });
document.addEventListener("click", event => choose(tokenOf(event)));
document.addEventListener("keydown", event => { if (event.key === "Escape") choose(null); });

// Answers -----------------------------------------------------------------------------------------------------------

const filter = document.getElementById("filter");
if (filter) {
  const prompts = [...document.querySelectorAll(".prompt")], shown = document.getElementById("shown");
  const further = document.getElementById("further");
  filter.closest(".controls").hidden = false;
  filter.addEventListener("change", () => {
    for (const prompt of prompts) prompt.hidden = filter.value !== "all" && !prompt.dataset.is.split(" ").includes(filter.value);
    const num = prompts.filter(prompt => !prompt.hidden).length;
    shown.textContent = `${num} of ${prompts.length}`;
    if (further) further.open = filter.value !== "all";
  });
}

// Print -------------------------------------------------------------------------------------------------------------

let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open]):not(.long)")];
  for (const details of folded) details.open = true;
});
addEventListener("afterprint", () => { for (const details of folded) details.open = false; });
