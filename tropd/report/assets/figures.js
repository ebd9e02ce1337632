// The charts on the page: drawn when they come into view, with a legend that the keyboard reaches, and numbers in a table.

const Figures = {
  view: { one: 0, picked: [], hidden: new Map() },
  drawn: new Set(),
  near: null,
  printing: false,

  start() {
    this.view.picked = Data.runs.map((_, i) => i).slice(0, MOST_PICKED);
    Theme.listeners.push(() => this.redraw());
    this.near = new IntersectionObserver(
      (entries) => {
        for (const entry of entries) if (entry.isIntersecting) this.draw(entry.target.dataset.chart);
      },
      { rootMargin: "300px 0px" },
    );
    window.addEventListener("beforeprint", () => this.print());
    window.addEventListener("afterprint", () => this.afterPrint());
    this.arrange();
    if ("requestIdleCallback" in window) window.requestIdleCallback(() => Library.load().catch(() => {}));
  },

  // After the HTML of the charts is new.
  arrange() {
    this.near.disconnect();
    this.drawn.clear();
    this.fillChooser();
    for (const figure of document.querySelectorAll("[data-chart]")) {
      const chart = this.chart(figure.dataset.chart);
      this.dress(figure, chart);
      figure.querySelector("details").addEventListener("toggle", (event) => {
        if (event.target.open) fillNumbers(figure, chart.id);
      });
      this.near.observe(figure);
    }
    this.paintDots();
  },

  chart: (id) => Data.charts.find((chart) => chart.id === id),
  figure: (id) => document.querySelector(`[data-chart="${CSS.escape(id)}"]`),
  viewOf(id) {
    return { ...this.view, hidden: this.view.hidden.get(id) ?? new Set() };
  },

  async draw(id, force = false) {
    if (this.drawn.has(id) && !force) return;
    this.drawn.add(id);
    const figure = this.figure(id);
    const place = figure.querySelector("[data-role=plot]");
    try {
      const Plotly = await Library.load();
      this.plot(Plotly, id, place);
    } catch (error) {
      place.textContent = `This chart could not be drawn: ${error.message}`;
    }
  },

  plot(Plotly, id, place, changes = {}) {
    const chart = this.chart(id);
    const { traces, layout } = drawing(chart, this.viewOf(id));
    if (!traces.length || !traces.some((trace) => trace.x.length)) {
      if (place.data) Plotly.purge(place);
      place.replaceChildren(make("p", { class: "note" }, "This run has no record of it."));
      return;
    }
    if (!place.data) place.replaceChildren();
    if (chart.kind === "marks") {
      place.classList.add("tall");
      layout.height = 70 + 34 * chart.lines.length;
    }
    const config = {
      responsive: true,
      displaylogo: false,
      modeBarButtonsToRemove: ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d", "pan2d", "zoom2d"],
      toImageButtonOptions: { format: "svg", filename: `tropd-${chart.id}` },
    };
    Plotly.react(place, traces, { ...layout, ...changes }, config);
    const svg = place.querySelector("svg.main-svg");
    if (svg) svg.setAttribute("aria-hidden", "true"); // the title, the caption and the numbers say it
  },

  redraw() {
    if (this.printing) return;
    for (const id of this.drawn) this.draw(id, true);
    for (const figure of document.querySelectorAll("[data-chart]")) fillLegend(figure, this.chart(figure.dataset.chart));
    this.fillChooser();
    this.paintDots();
  },

  // Caption, legend and numbers for what is shown now.
  dress(figure, chart) {
    const caption = chart.captions[chart.captions.length > 1 ? this.view.one : 0];
    figure.querySelector("[data-role=caption]").textContent = caption;
    const runs = drawsAllRuns(chart) ? chart.runs : [chart.runs[this.view.one]];
    const thinned = runs.filter((run) => run.of > run.shown);
    const said = thinned.length === 0 ? "" : thinnedText(chart, thinned[0]);
    figure.querySelector("[data-role=thinned]").textContent = said;
    fillLegend(figure, chart);
    if (figure.querySelector("details").open) fillNumbers(figure, chart.id);
  },

  // New data for the charts that are there already.
  update() {
    for (const figure of document.querySelectorAll("[data-chart]")) this.dress(figure, this.chart(figure.dataset.chart));
    for (const id of this.drawn) this.draw(id, true);
  },

  fillChooser() {
    const place = byId("run-legend");
    if (!place) return;
    const select = byId("one-run");
    select.value = String(this.view.one);
    select.onchange = () => {
      this.view.one = Number(select.value);
      this.update();
    };
    const held = place.contains(document.activeElement) ? [...place.children].indexOf(document.activeElement) : -1;
    const buttons = Data.runs.map((run, i) => {
      const slot = slotOf(this.view, i);
      const swatch = lineSwatch(slot < 0 ? { color: Theme.colour("line"), dash: "solid" } : dashed(slot));
      const button = make("button", { type: "button", "aria-pressed": String(slot >= 0) }, swatch, run.name);
      button.addEventListener("click", () => this.pick(i));
      return button;
    });
    place.replaceChildren(...buttons);
    if (held >= 0) buttons[held].focus();
  },

  pick(i) {
    const { picked } = this.view;
    if (picked.includes(i)) picked.splice(picked.indexOf(i), 1);
    else picked.push(i);
    if (picked.length > MOST_PICKED) picked.shift();
    this.redraw();
  },

  paintDots() {
    for (const dot of document.querySelectorAll(".dot[data-run]")) {
      const slot = slotOf(this.view, Number(dot.dataset.run));
      dot.style.background = slot < 0 ? "" : seriesColour(slot);
    }
  },

  print() {
    this.printing = true;
    Theme.apply("light");
    if (!window.Plotly) return;
    for (const figure of document.querySelectorAll("[data-chart]")) {
      this.drawn.add(figure.dataset.chart);
      this.plot(window.Plotly, figure.dataset.chart, figure.querySelector("[data-role=plot]"), { width: 330, height: 200 });
    }
  },

  afterPrint() {
    this.printing = false;
    Theme.apply();
  },
};

function thinnedText(chart, run) {
  const [shown, all] = [run.shown.toLocaleString("en"), run.of.toLocaleString("en")];
  if (chart.kind === "heat") return `Each column is the mean of its steps: ${shown} columns for ${all} steps.`;
  return `${shown} of ${all} steps are drawn; every stretch keeps its least and its largest number.`;
}

function fillLegend(figure, chart) {
  const place = figure.querySelector("[data-role=legend]");
  const shown = chart.lines.length > 1 && !["heat", "marks", "band"].includes(chart.kind);
  if (!shown) return place.replaceChildren();
  const hidden = Figures.view.hidden.get(chart.id) ?? new Set();
  const held = place.contains(document.activeElement) ? [...place.children].indexOf(document.activeElement) : -1;
  const buttons = chart.lines.map((line, i) => {
    const swatch = chart.kind === "stacked" ? areaSwatch(i) : lineSwatch(dashed(i));
    const button = make("button", { type: "button", "aria-pressed": String(!hidden.has(line.column)) }, swatch, line.label);
    button.addEventListener("click", () => {
      if (!hidden.delete(line.column)) hidden.add(line.column);
      Figures.view.hidden.set(chart.id, hidden);
      fillLegend(figure, chart);
      if (Figures.drawn.has(chart.id)) Figures.draw(chart.id, true);
    });
    return button;
  });
  place.replaceChildren(...buttons);
  if (held >= 0) buttons[held].focus();
}

const STROKES = { solid: "", dash: "6 3", dot: "2 3", dashdot: "6 3 2 3", longdash: "10 3", longdashdot: "10 3 2 3" };

function lineSwatch(style) {
  const line = make("svg:line", { x1: 0, x2: 27, y1: 6, y2: 6, stroke: style.color, "stroke-width": 2.4, "stroke-dasharray": STROKES[style.dash] });
  return make("svg:svg", { viewBox: "0 0 27 12", "aria-hidden": "true" }, line);
}

function areaSwatch(i) {
  const colour = seriesColour(i);
  const box = make("svg:rect", { x: 0, y: 0, width: 27, height: 12, fill: fade(colour, 0.35), stroke: colour });
  const marks = { "/": "M2 12L12 0M14 12L24 0", ".": "M5 6h1M13 6h1M21 6h1", "\\": "M2 0L12 12M14 0L24 12", x: "M2 12L12 0M2 0L12 12M14 12L24 0M14 0L24 12", "-": "M0 6h27", "|": "M7 0v12M14 0v12M21 0v12", "+": "M0 6h27M13 0v12" };
  const shape = marks[SHAPES[i % SHAPES.length]] ?? "";
  return make("svg:svg", { viewBox: "0 0 27 12", "aria-hidden": "true" }, box, make("svg:path", { d: shape, stroke: colour, "stroke-width": 1.6, fill: "none" }));
}

function fillNumbers(figure, id) {
  const chart = Figures.chart(id);
  const rows = [];
  chart.runs.forEach((run, i) => {
    if (!drawsAllRuns(chart) && i !== Figures.view.one) return;
    for (const line of chart.lines) {
      if (chart.kind === "marks" || !run.y[line.column]) continue;
      const known = run.y[line.column].map((y, n) => [run.x[n], y]).filter(([, y]) => y !== null);
      if (!known.length) continue;
      const least = known.reduce((a, b) => (b[1] < a[1] ? b : a));
      const most = known.reduce((a, b) => (b[1] > a[1] ? b : a));
      const name = drawsAllRuns(chart) ? Data.runs[i].name : line.label;
      const at = ([x, y]) => `${say(y, chart.format)} (step ${Math.round(x).toLocaleString("en")})`;
      rows.push([name, say(known[0][1], chart.format), say(known[known.length - 1][1], chart.format), at(least), at(most)]);
    }
    if (chart.kind === "marks") {
      for (const line of chart.lines) rows.push([line.label, ...(run.y[line.column] ?? []).slice(0, 4).map(([a, b]) => (a === b ? `step ${a}` : `steps ${a} to ${b}`))]);
    }
  });
  const names = chart.kind === "marks" ? ["alarm", "first stretches"] : ["", "first", "last", "least", "largest"];
  const head = make("thead", {}, make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name))));
  const body = make("tbody", {}, ...rows.map(([name, ...cells]) => make("tr", {}, make("th", { scope: "row" }, name), ...cells.map((cell) => make("td", { class: "n" }, cell)))));
  figure.querySelector("[data-role=numbers]").replaceChildren(make("table", {}, head, body));
}

Figures.start();
