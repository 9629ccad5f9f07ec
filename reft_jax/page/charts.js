// Charts with uPlot. Each has a line of text with the values under the pointer, and answers to the arrow keys.
const COLOURS = { light: ["#1a5fb4", "#a5420c", "#1a6b35"], dark: ["#8ab8ff", "#ffb27a", "#7fd89a"] };
const WHOLE = [1, 2, 5].flatMap((one) => [0, 1, 2, 3, 4, 5].map((power) => one * 10 ** power)).sort((a, b) => a - b);
const drawn = [];

const theme = () => document.documentElement.dataset.theme;
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function reading(chart, at) {
  const values = Object.entries(chart.lines).map(([name, ys]) => (name ? name + " " : "") + number(ys[at]));
  return chart.x + " " + number(chart.xs[at]) + ": " + values.join(", ") + " (" + chart.unit + ")";
}

function plot(chart, box, output) {
  const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false } };
  const values = Object.values(chart.lines).flat().filter((value) => value !== null);
  const lines = Object.keys(chart.lines).map((name, i) => ({
    label: name, stroke: COLOURS[theme()][i], width: 2, points: { show: chart.xs.length < 60, size: 5 }, spanGaps: true,
  }));
  const options = {
    width: box.clientWidth, height: 210, series: [{}, ...lines], cursor: { y: false }, legend: { show: false },
    scales: { x: { time: false }, y: { range: [Math.min(0, ...values), Math.max(...values) * 1.08 || 1] } },
    axes: [
      { ...axis, size: 30, incrs: WHOLE },
      { ...axis, size: 55, values: (self, ticks) => ticks.map((tick) => number(tick)) },
    ],
    hooks: { setCursor: [(self) => {
      const at = self.cursor.idx;
      if (at !== null && at !== undefined) output.textContent = reading(chart, at);
    }] },
  };
  return new uPlot(options, [chart.xs, ...Object.values(chart.lines)], box);
}

function table(chart) {
  const names = Object.keys(chart.lines);
  const heads = [chart.x, ...names.map((name) => name || chart.unit)];
  const head = make("tr", "", ...heads.map((text) => make("th", "", text)));
  const rows = chart.xs.map((x, i) => make("tr", "", make("td", "", number(x)),
    ...names.map((name) => make("td", "", number(chart.lines[name][i])))));
  const wide = make("div", "wide", make("table", "", make("thead", "", head), make("tbody", "", ...rows)));
  return make("details", "", make("summary", "", "Values"), wide);
}

function figure(chart) {
  const box = make("div", "plot"), output = make("output", "", chart.unit), last = chart.xs.length - 1;
  const names = Object.keys(chart.lines).filter(Boolean), legend = names.join(", ");
  const keys = names.map((name) => make("span", "", make("i"), name));
  const whole = make("figure", "", make("figcaption", "", ...visible(chart.title), ...keys), box, output, table(chart));
  byId("charts").append(whole);
  box.tabIndex = 0;
  box.setAttribute("role", "img");
  const about = chart.title + (legend ? " (" + legend + ")" : "");
  box.setAttribute("aria-label", about + "; last value: " + reading(chart, last));
  let at = last;
  box.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, Home: -last, End: last }[event.key];
    if (!step) return;
    event.preventDefault();
    at = Math.max(0, Math.min(last, at + step));
    output.textContent = reading(chart, at);
  });
  return () => {
    if (typeof uPlot === "undefined") return;
    keys.forEach((key, i) => { key.firstChild.style.background = COLOURS[theme()][i]; });
    box.replaceChildren();
    plot(chart, box, output);
  };
}

function drawCharts(charts) {
  if (!charts.length) byId("charts").append(make("p", "", "There are no curves yet."));
  drawn.push(...charts.map(figure));
  redraw();
  let waiting = 0;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(redraw, 150); });
}

function redraw() {
  drawn.forEach((draw) => draw());
}
