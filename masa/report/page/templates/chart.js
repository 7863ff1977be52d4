"use strict";
// One chart of uPlot for any number of curves, each with its own places on the x axis.

/** The number in short: 1.5M, 240k, 12. */
function shortNumber(value) {
  for (const [size, letter] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= size) return `${Number((value / size).toPrecision(4))}${letter}`;
  }
  return String(Number(value.toPrecision(4)));
}

/** Nearest place to the hovered one at which a curve has a value: curves of other runs have others. */
function nearest(plot, series, hovered) {
  const values = plot.data[series];
  const xs = plot.data[0];
  if (values[hovered] != null) return hovered;
  let left = hovered;
  let right = hovered;
  while (left >= 0 && values[left] == null) left -= 1;
  while (right < values.length && values[right] == null) right += 1;
  if (left < 0) return right < values.length ? right : hovered;
  if (right >= values.length) return left;
  return xs[hovered] - xs[left] <= xs[right] - xs[hovered] ? left : right;
}

/**
 * Draw curves anew.
 * @param {HTMLElement} box
 * @param {{name: string, colour: string, dash: number[], thin: boolean, points: boolean, x: number[], y: number[]}[]} curves
 * @param {{label: string, log: boolean, moved: function(uPlot)}} options
 * @returns {uPlot}
 */
function drawChart(box, curves, options) {
  box.replaceChildren();
  const data = uPlot.join(curves.map((curve) => [curve.x, curve.y]));
  const series = curves.map((curve) => ({
    label: curve.name,
    stroke: curve.colour,
    width: curve.thin ? 1 : 2,
    alpha: curve.thin ? 0.6 : 1,
    dash: curve.dash,
    spanGaps: true,
    points: { show: curve.points, size: 5, fill: curve.colour },
  }));
  return new uPlot({
    width: box.clientWidth,
    height: chartHeight(box),
    legend: { show: false },
    cursor: { dataIdx: nearest, focus: { prox: 30 }, points: { size: 7 } },
    focus: { alpha: 0.3 },
    scales: { x: { time: false }, y: { distr: options.log ? 3 : 1 } },
    axes: [
      { label: options.label, values: (_, ticks) => ticks.map(shortNumber), size: 40, labelSize: 22 },
      { label: "loss (nats)", values: (_, ticks) => ticks.map((v) => (v == null ? "" : Number(v.toPrecision(4)))), size: 56, labelSize: 22 },
    ],
    series: [{}, ...series],
    hooks: { setCursor: [options.moved] },
  }, data, box);
}

function chartHeight(box) {
  return box.clientWidth < 560 ? 300 : 430;
}
