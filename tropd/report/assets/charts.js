// From a chart's data to what plotly draws.  Nothing here touches the page.

const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
const SHAPES = ["", "/", ".", "\\", "x", "-", "|", "+"];
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "x", "star", "cross", "pentagon"];
const MOST_PICKED = Data.grouped ? 48 : 8;

// plotly reads labels as a kind of markup; a run's name is none.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const seriesColour = (index) => Theme.colour(`s${index % 8}`);

function lineStyle(index) {
  return { color: seriesColour(index), width: 1.8, dash: "solid" };
}

// A second way, beside the colour, to tell lines apart.
function dashed(index) {
  return { ...lineStyle(index), dash: DASHES[index % DASHES.length] };
}

function hover(format) {
  return { share: ":.1%", seconds: ":.3~g", tokens: ":,.4~g" }[format] ?? ":.4~g";
}

// `view` says what the reader chose: {one: shown run, picked: highlighted runs in order, hidden: lines not shown}
function drawing(chart, view) {
  const several = chart.runs.length > 1;
  const builders = { stacked: stackedTraces, band: bandTraces, heat: heatTraces, marks: markTraces };
  let traces;
  if (builders[chart.kind]) traces = builders[chart.kind](chart, view);
  else if (several && chart.lines.length === 1) traces = comparedTraces(chart, view);
  else traces = lineTraces(chart, view);
  return { traces, layout: layoutOf(chart, traces) };
}

function drawsAllRuns(chart) {
  return chart.runs.length > 1 && chart.lines.length === 1 && ["lines", "scores"].includes(chart.kind);
}

// Which look a highlighted run has: that of its group where several seeds make one, -1 where it is not highlighted.
function slotOf(view, i) {
  if (!Data.grouped) return view.picked.indexOf(i);
  return view.picked.includes(i) ? Data.runs[i].group : -1;
}

function lineTraces(chart, view) {
  const run = chart.runs[view.one];
  return chart.lines.flatMap((line, i) => {
    if (view.hidden.has(line.column) || !run.y[line.column]) return [];
    return [series(chart, run, line.column, line.label, dashed(i), i)];
  });
}

function comparedTraces(chart, view) {
  const { column } = chart.lines[0];
  const rest = { x: [], y: [] };
  chart.runs.forEach((run, i) => {
    if (view.picked.includes(i) || !run.y[column]) return;
    for (const x of run.x) rest.x.push(x);
    for (const y of run.y[column]) rest.y.push(y);
    rest.x.push(null);
    rest.y.push(null);
  });
  const muted = { color: Theme.colour("muted"), width: 1 };
  const traces = rest.x.length
    ? [{ type: "scatter", mode: "lines", x: rest.x, y: rest.y, line: muted, opacity: 0.28, hoverinfo: "skip", showlegend: false }]
    : [];
  view.picked.forEach((i) => {
    const run = chart.runs[i];
    const look = slotOf(view, i);
    if (run.y[column]) traces.push(series(chart, run, column, Data.runs[i].name, dashed(look), look));
  });
  return traces;
}

function series(chart, run, column, label, style, index) {
  const y = run.y[column];
  const few = y.filter((v) => v !== null).length < 25;
  const trace = {
    type: "scatter",
    x: run.x,
    y,
    name: plain(label),
    line: style,
    mode: few || chart.kind === "scores" ? "lines+markers" : "lines",
    marker: { size: 6, symbol: SYMBOLS[index % SYMBOLS.length], color: style.color },
    hovertemplate: `%{y${hover(chart.format)}}<extra>${plain(label)}</extra>`,
  };
  const [low, high] = [run.y[`${column}/low`], run.y[`${column}/high`]];
  if (low && high) {
    trace.error_y = {
      type: "data",
      symmetric: false,
      array: high.map((h, i) => (h === null || y[i] === null ? 0 : h - y[i])),
      arrayminus: low.map((l, i) => (l === null || y[i] === null ? 0 : y[i] - l)),
      thickness: 1.2,
      width: 3,
      color: style.color,
    };
    trace.hovertemplate = `%{y${hover(chart.format)}} [%{customdata[0]:.4~g}, %{customdata[1]:.4~g}]<extra>${plain(label)}</extra>`;
    trace.customdata = low.map((l, i) => [l, high[i]]);
  }
  return trace;
}

function stackedTraces(chart, view) {
  const run = chart.runs[view.one];
  return chart.lines.flatMap((line, i) => {
    if (view.hidden.has(line.column) || !run.y[line.column]) return [];
    const colour = seriesColour(i);
    return [
      {
        type: "scatter",
        mode: "lines",
        stackgroup: "parts",
        x: run.x,
        y: run.y[line.column],
        name: plain(line.label),
        line: { color: colour, width: 1 },
        fillcolor: fade(colour, 0.35),
        fillpattern: { shape: SHAPES[i % SHAPES.length], fgcolor: fade(colour, 0.75), bgcolor: fade(colour, 0.22), size: 7, solidity: 0.16 },
        hovertemplate: `%{y${hover(chart.format)}}<extra>${plain(line.label)}</extra>`,
      },
    ];
  });
}

function bandTraces(chart, view) {
  const run = chart.runs[view.one];
  const at = (name) => run.y[`probe/ratio/${name}`];
  const colour = seriesColour(0);
  const none = { width: 0, color: "rgba(0,0,0,0)" };
  const edge = (name, label, extra) => ({
    type: "scatter",
    mode: "lines",
    x: run.x,
    y: at(name),
    name: label,
    hovertemplate: `%{y:.3~g}<extra>${label}</extra>`,
    ...extra,
  });
  const wanted = [
    ["max", "largest", { line: { color: Theme.colour("muted"), width: 1, dash: "dot" } }],
    ["p99", "99 %", { line: none }],
    ["p01", "1 %", { line: none, fill: "tonexty", fillcolor: fade(colour, 0.15) }],
    ["p95", "95 %", { line: none }],
    ["p05", "5 %", { line: none, fill: "tonexty", fillcolor: fade(colour, 0.25) }],
    ["p50", "median", { line: { color: colour, width: 1.8 } }],
    ["min", "least", { line: { color: Theme.colour("muted"), width: 1, dash: "dot" } }],
  ];
  const traces = wanted.filter(([name]) => at(name)).map((parts) => edge(...parts));
  if (traces.length && run.x.length < 25) for (const trace of traces) if (trace.name === "median") trace.mode = "lines+markers";
  return traces;
}

function heatTraces(chart, view) {
  const run = chart.runs[view.one];
  const lines = chart.lines.filter((line) => run.y[line.column]);
  return [
    {
      type: "heatmap",
      x: run.x,
      y: lines.map((line) => line.label),
      z: lines.map((line) => run.y[line.column]),
      colorscale: [[0, Theme.colour("paper")], [0.5, mix(Theme.colour("paper"), seriesColour(0), 0.55)], [1, seriesColour(0)]],
      zmin: 0,
      colorbar: { thickness: 8, outlinewidth: 0, tickformat: ".0%", len: 1, tickfont: { size: 11 } },
      hovertemplate: "step %{x:.0f}, part %{y}: %{z:.1%}<extra></extra>",
    },
  ];
}

function markTraces(chart, view) {
  const run = chart.runs[view.one];
  return chart.lines.flatMap((line, i) => {
    const stretches = run.y[line.column] ?? [];
    if (!stretches.length) return [];
    return [
      {
        type: "scatter",
        mode: "lines+markers",
        x: stretches.flatMap(([a, b]) => [a, b, null]),
        y: stretches.flatMap(() => [line.label, line.label, null]),
        name: plain(line.label),
        line: { color: seriesColour(1), width: 6 },
        marker: { symbol: SYMBOLS[i % SYMBOLS.length], size: 9, color: seriesColour(1) },
        hovertemplate: "step %{x}<extra>%{y}</extra>",
      },
    ];
  });
}

function layoutOf(chart, traces) {
  const axis = {
    gridcolor: Theme.colour("grid"),
    linecolor: Theme.colour("line"),
    zeroline: false,
    automargin: true,
    tickfont: { size: 11.5, color: Theme.colour("muted") },
    title: { text: "" },
  };
  const scored = chart.kind === "scores";
  const layout = {
    autosize: true,
    margin: { l: 44, r: 10, t: 8, b: 34 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: Theme.colour("sans"), size: 12, color: Theme.colour("ink") },
    hovermode: ["heat", "marks"].includes(chart.kind) ? "closest" : "x unified",
    hoverlabel: { bgcolor: Theme.colour("raised"), bordercolor: Theme.colour("line"), font: { color: Theme.colour("ink"), size: 12 } },
    showlegend: false,
    uirevision: "kept",
    dragmode: "zoom",
    xaxis: { ...axis, showgrid: false, ticks: "outside", ticklen: 4, tickcolor: Theme.colour("line"), title: { text: scored ? "steps trained" : "step", font: { size: 11.5, color: Theme.colour("muted") }, standoff: 6 }, hoverformat: ",.0f" },
    yaxis: { ...axis, nticks: 6, exponentformat: "e", rangemode: chart.zero && !chart.log ? "tozero" : "normal" },
  };
  if (chart.log) Object.assign(layout.yaxis, { type: "log", dtick: null, exponentformat: "power", minor: { showgrid: false } });
  if (chart.format === "share") layout.yaxis.tickformat = ".0%";
  if (chart.format === "seconds") layout.yaxis.ticksuffix = " s";
  if (chart.kind === "heat") Object.assign(layout.yaxis, { showticklabels: true, showgrid: false, rangemode: "normal" });
  if (chart.kind === "marks") Object.assign(layout.yaxis, { type: "category", rangemode: "normal", showgrid: false });
  const steps = traces.flatMap((trace) => [trace.x[0], trace.x[trace.x.length - 1]]).filter((x) => Number.isFinite(x));
  if (chart.kind === "marks" && chart.runs.length) steps.push(...chart.runs.flatMap((run) => run.x));
  const [first, last] = [Math.min(...steps), Math.max(...steps)];
  if (steps.length && last - first < 8) Object.assign(layout.xaxis, { dtick: 1, range: [first - 0.5, last + 0.5] });
  if (chart.kind === "marks" && last > first) layout.xaxis.range = [first - 0.5, last + 0.5];
  if (chart.limit) addLimit(layout, chart.limit);
  return layout;
}

function addLimit(layout, limit) {
  layout.shapes = [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: limit, y1: limit, line: { color: Theme.colour("muted"), width: 1, dash: "dot" } }];
  layout.annotations = [{ xref: "paper", x: 1, y: Math.log10(limit), yanchor: "bottom", xanchor: "right", showarrow: false, text: `clipped above ${limit}`, font: { size: 11, color: Theme.colour("muted") } }];
}

function channels(colour) {
  return [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
}

function fade(colour, opacity) {
  return `rgba(${channels(colour).join(",")},${opacity})`;
}

function mix(a, b, share) {
  const [x, y] = [channels(a), channels(b)];
  return `rgb(${x.map((v, i) => Math.round(v + (y[i] - v) * share)).join(",")})`;
}
