"use strict";
// Which runs are in the chart, and what their values are at the pointer.

(() => {
  const source = document.getElementById("curve-data");
  if (!source) return;
  const runs = JSON.parse(source.textContent);
  const box = document.getElementById("chart");
  const tip = Object.assign(document.createElement("div"), { className: "tip", hidden: true });
  const body = document.querySelector("#legend tbody");
  const off = new Set();  // runs that were taken out one by one
  let plot = null;
  let curves = [];

  const control = (id) => document.getElementById(id);
  const distinct = (key) => [...new Set(runs.map((run) => run[key]))];

  function swatch(run) {
    const picture = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    picture.setAttribute("class", "swatch");
    picture.setAttribute("viewBox", "0 0 28 10");
    const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
    for (const [key, value] of Object.entries({ x1: 0, x2: 28, y1: 5, y2: 5, stroke: run.colour, "stroke-width": 2.5 })) {
      line.setAttribute(key, value);
    }
    line.setAttribute("stroke-dasharray", run.dash.join(" "));
    picture.append(line);
    return picture;
  }

  function addChoice(key, value, checked, run) {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type: "checkbox", checked, value: String(value) });
    input.addEventListener("change", draw);
    label.append(input, ...(run ? [swatch(run)] : []), ` ${value}`);
    control(`choose-${key}`).append(label);
  }

  function addAll(key) {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: "all / none" });
    button.addEventListener("click", () => {
      const inputs = [...control(`choose-${key}`).querySelectorAll("input")];
      const every = inputs.every((input) => input.checked);
      for (const input of inputs) input.checked = !every;
      draw();
    });
    control(`choose-${key}`).append(button);
  }

  function chosen(key) {
    return new Set([...control(`choose-${key}`).querySelectorAll("input:checked")].map((input) => input.value));
  }

  function matching() {
    const [scales, methods, seeds] = ["scale", "method", "seed"].map(chosen);
    return runs.filter((run) => scales.has(run.scale) && methods.has(run.method) && seeds.has(String(run.seed)));
  }

  function curvesOf(run) {
    const axis = control("x-axis").value;
    const look = { run, colour: run.colour, dash: run.dash };
    const found = [];
    if (control("show-train").checked && run.train.losses.length) {
      const y = smooth(run.train.losses, Number(control("smoothing").value));
      found.push({ ...look, name: `${run.id}, training`, kind: "train", thin: true, points: false, x: run.train[axis], y });
    }
    if (control("show-held").checked && run.held.losses.length) {
      found.push({ ...look, name: `${run.id}, held-out`, kind: "held", thin: false, points: run.held.losses.length < 80, x: run.held[axis], y: run.held.losses });
    }
    return found;
  }

  function axisLabel(shown) {
    const units = [...new Set(shown.map((curve) => curve.run.unit))].sort().reverse();
    return { amounts: `training ${units.join(" or ")}`, steps: "steps", seconds: "seconds of training" }[control("x-axis").value];
  }

  function draw() {
    const found = matching();
    curves = found.filter((run) => !off.has(run.id)).flatMap(curvesOf);
    plot?.destroy();
    plot = null;
    control("chart-empty").hidden = curves.length > 0;
    box.dataset.curves = curves.length;
    if (curves.length) {
      plot = drawChart(box, curves, { label: axisLabel(curves), log: control("log-axis").checked, moved });
      plot.over.append(tip);
      plot.over.addEventListener("mouseleave", () => { tip.hidden = true; values(null); });
    } else {
      box.replaceChildren();
    }
    listRuns(found);
    values(null);
  }

  function listRuns(found) {
    body.replaceChildren(...found.map((run) => {
      const row = document.createElement("tr");
      const label = document.createElement("label");
      const input = Object.assign(document.createElement("input"), { type: "checkbox", checked: !off.has(run.id) });
      input.addEventListener("change", () => { off[input.checked ? "delete" : "add"](run.id); draw(); });
      const state = run.state === "finished" ? "" : ` (${run.state})`;
      label.append(input, swatch(run), ` ${run.method}, ${run.scale}, seed ${run.seed}${state}`);
      const name = Object.assign(document.createElement("th"), { scope: "row" });
      name.append(label);
      const numbers = ["held", "train"].map((kind) => {
        const cell = Object.assign(document.createElement("td"), { className: "number" });
        cell.dataset.value = `${run.id} ${kind}`;
        return cell;
      });
      row.append(name, ...numbers);
      return row;
    }));
  }

  /** Fill the values of the list: at some places of the chart's data, or at the end of each curve. */
  function values(places) {
    const shown = new Map(curves.map((curve, i) => [
      `${curve.run.id} ${curve.kind}`, places ? plot.data[i + 1][places[i + 1]] : curve.y.at(-1),
    ]));
    for (const cell of body.querySelectorAll("[data-value]")) {
      const value = shown.get(cell.dataset.value);
      cell.textContent = value == null ? "" : value.toFixed(4);
    }
  }

  function moved(chart) {
    const { left, top, idx, idxs } = chart.cursor;
    if (idx == null || left < 0 || chart !== plot) return;
    values(idxs);
    let best = null;
    curves.forEach((curve, i) => {
      const value = chart.data[i + 1][idxs[i + 1]];
      const away = value == null ? Infinity : Math.abs(chart.valToPos(value, "y") - top);
      if (!best || away < best.away) best = { away, curve, value, x: chart.data[0][idxs[i + 1]] };
    });
    tip.hidden = !best || best.away > 60;
    if (tip.hidden) return;
    tip.textContent = `${best.curve.run.method}, seed ${best.curve.run.seed} (${best.curve.kind === "held" ? "held-out" : "training"})\n${best.value.toFixed(4)} at ${shortNumber(best.x)}`;
    const right = left > chart.over.clientWidth / 2;
    tip.style.left = right ? "auto" : `${left + 14}px`;
    tip.style.right = right ? `${chart.over.clientWidth - left + 14}px` : "auto";
    tip.style.top = `${Math.max(0, top - 46)}px`;
  }

  const counts = new Map();
  for (const run of runs) counts.set(run.scale, (counts.get(run.scale) ?? 0) + run.own);
  const most = [...counts].reduce((a, b) => (b[1] > a[1] ? b : a))[0];
  for (const scale of distinct("scale")) addChoice("scale", scale, scale === most);
  for (const method of distinct("method")) addChoice("method", method, true, runs.find((run) => run.method === method));
  for (const seed of distinct("seed").sort((a, b) => a - b)) addChoice("seed", seed, true);
  addAll("method");
  for (const id of ["show-held", "show-train", "x-axis", "log-axis", "smoothing"]) control(id).addEventListener("input", draw);
  draw();

  let width = box.clientWidth;
  new ResizeObserver(() => {
    if (plot && box.clientWidth !== width) {
      width = box.clientWidth;
      plot.setSize({ width, height: chartHeight(box) });
    }
  }).observe(box);
})();
