"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const runs = data.runs;
  const hidden = new Set();
  const state = { smoothing: 0, log: false };
  const SVG = "http://www.w3.org/2000/svg";
  const HEIGHT = 210, LEFT = 54, RIGHT = 12, TOP = 10, BOTTOM = 24;

  const color = (number) => `var(--c${number % 8})`;

  function make(name, attributes, parent, text) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    if (parent) parent.append(element);
    return element;
  }

  function draw(name, attributes, parent, text) {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    parent.append(element);
    return element;
  }

  function short(value) {
    const size = Math.abs(value);
    if (value === 0) return "0";
    if (size >= 1e9 || size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
    if (size >= 1e6) return +(value / 1e6).toPrecision(4) + "M";
    if (size >= 1e4) return +(value / 1e3).toPrecision(4) + "k";
    return String(+value.toPrecision(4));
  }

  function precise(value) {
    const size = Math.abs(value);
    return size !== 0 && (size >= 1e7 || size < 1e-3) ? value.toExponential(3) : String(+value.toPrecision(5));
  }

  function duration(seconds) {
    const s = Math.round(seconds);
    if (s < 120) return `${s} s`;
    if (s < 7200) return `${Math.floor(s / 60)} min`;
    if (s < 172800) return `${Math.floor(s / 3600)} h ${String(Math.floor((s % 3600) / 60)).padStart(2, "0")} min`;
    return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
  }

  function ticks(low, high, count) {
    const raw = (high - low) / count || 1;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].find((factor) => factor * power >= raw * 0.999) * power;
    const found = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9 && found.length < 50; k++) found.push(k * step);
    return found;
  }

  function logTicks(low, high, count) {
    const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9);
    if (last - first < 1) {
      const candidates = [];
      for (let power = first - 1; power <= last; power++) for (const f of [1, 2, 3, 5]) candidates.push(f * 10 ** power);
      const inside = candidates.filter((v) => v >= low * 0.999 && v <= high * 1.001);
      return inside.length >= 2 ? inside : ticks(low, high, 3).filter((v) => v > 0);
    }
    const every = Math.max(1, Math.ceil((last - first + 1) / count));
    const found = [];
    for (let power = first; power <= last; power += every) found.push(10 ** power);
    return found;
  }

  // The exponential moving average, without the bias of its start. Gaps stay gaps.
  function smoothed(values, weight) {
    if (!weight) return values;
    let mean = 0, total = 0;
    return values.map((value) => {
      if (value === null) return null;
      mean = weight * mean + (1 - weight) * value;
      total = weight * total + (1 - weight);
      return mean / total;
    });
  }

  function path(xs, ys, X, Y, usable) {
    let text = "", open = false, alone = false, lastX = 0, lastY = 0;
    const close = () => { if (open && alone) text += `h0.01`; };
    for (let i = 0; i < xs.length; i++) {
      if (ys[i] === null || !usable(ys[i])) { close(); open = false; continue; }
      lastX = X(xs[i]); lastY = Y(ys[i]);
      text += `${open ? "L" : "M"}${lastX.toFixed(1)} ${lastY.toFixed(1)}`;
      alone = !open;
      open = true;
    }
    close();
    return text;
  }

  function band(curve, X, Y, usable) {
    const forth = [], back = [];
    for (let i = 0; i < curve.x.length; i++) {
      if (curve.lo[i] === null || !usable(curve.lo[i])) continue;
      forth.push(`${X(curve.x[i]).toFixed(1)} ${Y(curve.hi[i]).toFixed(1)}`);
      back.push(`${X(curve.x[i]).toFixed(1)} ${Y(curve.lo[i]).toFixed(1)}`);
    }
    return forth.length > 1 ? `M${forth.join("L")}L${back.reverse().join("L")}Z` : "";
  }

  const charts = [];

  // A chart of one name: a curve for each run that has it.
  class Chart {
    constructor(parent, name, curves, unit, smooth) {
      this.smooth = smooth;
      this.curves = curves;
      this.figure = make("figure", {}, parent);
      const caption = make("figcaption", {}, this.figure, name);
      if (unit) make("small", {}, caption, ` ${unit}`);
      this.svg = draw("svg", { height: HEIGHT, role: "img" }, this.figure);
      draw("title", {}, this.svg, name);
      this.layer = draw("g", {}, this.svg);
      this.overlay = draw("g", {}, this.svg);
      this.tip = make("div", { class: "tip", hidden: "" }, this.figure);
      this.svg.addEventListener("pointermove", (event) => this.hover(event));
      this.svg.addEventListener("pointerdown", (event) => this.hover(event));
      this.svg.addEventListener("pointerleave", () => this.leave());
      charts.push(this);
    }

    get shown() { return this.curves.filter(({ run }) => !hidden.has(run)); }

    render() {
      this.leave();
      this.layer.replaceChildren();
      const width = this.svg.clientWidth || 360;
      this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
      const log = state.log && this.shown.some(({ curve }) => curve.y.some((v) => v > 0));
      const usable = log ? (v) => v > 0 : () => true;
      const weight = this.smooth ? state.smoothing : 0;
      this.prepared = this.shown.map((each) => ({ ...each, y: smoothed(each.curve.y, weight) }));
      let x0 = Infinity, x1 = -Infinity, y0 = Infinity, y1 = -Infinity;
      const see = (values) => {
        for (const v of values) if (v !== null && usable(v)) { if (v < y0) y0 = v; if (v > y1) y1 = v; }
      };
      for (const { curve } of this.prepared) {
        for (const x of curve.x) { if (x < x0) x0 = x; if (x > x1) x1 = x; }
        see(curve.y); see(curve.lo || []); see(curve.hi || []);
        for (const part of curve.lost || []) { see(part.y); for (const x of part.x) { if (x < x0) x0 = x; if (x > x1) x1 = x; } }
      }
      if (x0 > x1) return;
      const noValues = y0 > y1;
      if (noValues) { y0 = log ? 0.1 : 0; y1 = 1; }
      if (x0 === x1) { x0 -= 1; x1 += 1; }
      if (y0 === y1) {
        const pad = Math.abs(y0) * 0.1 || 1;
        if (log) { y0 /= 1.5; y1 *= 1.5; } else { y0 -= pad; y1 += pad; }
      } else if (!log) {
        const pad = (y1 - y0) * 0.04;
        y0 -= pad; y1 += pad;
      }
      const inner = width - LEFT - RIGHT, tall = HEIGHT - TOP - BOTTOM;
      const X = (x) => LEFT + (inner * (x - x0)) / (x1 - x0);
      const scale = log ? Math.log10 : (v) => v;
      const low = scale(y0), span = scale(y1) - low || 1;
      const Y = (y) => TOP + tall * (1 - (scale(y) - low) / span);
      this.view = { X, Y, x0, x1, width, usable };
      for (const y of log ? logTicks(y0, y1, 5) : ticks(y0, y1, 4)) {
        const at = Y(y);
        if (at < TOP - 1 || at > HEIGHT - BOTTOM + 1) continue;
        draw("line", { class: "gridline", x1: LEFT, x2: width - RIGHT, y1: at, y2: at }, this.layer);
        draw("text", { x: LEFT - 6, y: at + 4, "text-anchor": "end" }, this.layer, short(y));
      }
      for (const x of ticks(x0, x1, Math.max(2, Math.floor(inner / 90)))) {
        if (!Number.isInteger(x) || x < x0 || x > x1) continue;
        draw("text", { x: X(x), y: HEIGHT - 7, "text-anchor": "middle" }, this.layer, short(x));
      }
      for (const { tint, curve } of this.prepared) {
        for (const part of curve.lost || [])
          draw("path", { class: "lost", d: path(part.x, part.y, X, Y, usable), stroke: color(tint) }, this.layer);
        if (curve.lo) draw("path", { class: "range", d: band(curve, X, Y, usable), fill: color(tint), stroke: color(tint) }, this.layer);
        if (weight)
          draw("path", { class: "raw", d: path(curve.x, curve.y, X, Y, usable), stroke: color(tint) }, this.layer);
      }
      for (const { tint, curve, y } of this.prepared) {
        draw("path", { class: "line", d: path(curve.x, y, X, Y, usable), stroke: color(tint) }, this.layer);
        if (curve.x.length <= FEW)
          curve.x.forEach((x, i) => {
            if (y[i] !== null && usable(y[i])) draw("circle", { cx: X(x), cy: Y(y[i]), r: 2.5, fill: color(tint) }, this.layer);
          });
        for (const x of curve.bad || [])
          draw("text", { class: "badmark", x: X(x), y: TOP + 9, "text-anchor": "middle" }, this.layer, "✕");
      }
      const bad = this.prepared.reduce((sum, { curve }) => sum + (curve.badCount || 0), 0);
      if (bad) {
        const label = `✕ ${bad} value${bad > 1 ? "s are" : " is"} NaN or Inf`;
        draw("text", { class: "badmark", x: width - RIGHT, y: -6, "text-anchor": "end" }, this.layer, label);
      }
    }

    hover(event) {
      if (!this.view || !this.prepared.length) return;
      const box = this.svg.getBoundingClientRect();
      const { X, Y, x0, x1, width, usable } = this.view;
      const wanted = x0 + ((event.clientX - box.left - LEFT) / (width - LEFT - RIGHT)) * (x1 - x0);
      let at = null;
      for (const { curve } of this.prepared) {
        const x = curve.x[nearest(curve.x, wanted)];
        if (x !== undefined && (at === null || Math.abs(x - wanted) < Math.abs(at - wanted))) at = x;
      }
      if (at === null) return;
      this.overlay.replaceChildren();
      draw("line", { class: "cursor", x1: X(at), x2: X(at), y1: TOP, y2: HEIGHT - BOTTOM }, this.overlay);
      this.tip.replaceChildren();
      make("div", { class: "faint" }, this.tip, `iteration ${at.toLocaleString("en")}`);
      for (const { tint, label, curve, y } of this.prepared.slice(0, MOST_ROWS)) {
        const i = nearest(curve.x, at);
        if (curve.x[i] === undefined) continue;
        const row = make("div", {}, this.tip);
        make("i", { class: `dot c${tint % 8}` }, row);
        if (label) make("span", { class: "faint" }, row, `${label}: `);
        let text = y[i] === null ? "NaN or Inf" : precise(curve.y[i]);
        if (curve.lo && curve.lo[i] !== null) text += ` (${precise(curve.lo[i])} to ${precise(curve.hi[i])})`;
        if (y !== curve.y && y[i] !== null) text += `, smoothed ${precise(y[i])}`;
        if (curve.x[i] !== at) text += ` at ${curve.x[i].toLocaleString("en")}`;
        row.append(text);
        if (y[i] !== null && usable(y[i]))
          draw("circle", { cx: X(curve.x[i]), cy: Y(y[i]), r: 3.5, fill: color(tint) }, this.overlay);
      }
      const rest = this.prepared.length - MOST_ROWS;
      if (rest > 0) make("div", { class: "faint" }, this.tip, `and ${rest} more`);
      this.tip.hidden = false;
      const room = this.figure.clientWidth, left = X(at) + 20;
      this.tip.style.left = `${Math.max(4, left + this.tip.offsetWidth > room ? X(at) - this.tip.offsetWidth - 4 : left)}px`;
      this.tip.style.top = "2.2rem";
    }

    leave() {
      this.overlay.replaceChildren();
      this.tip.hidden = true;
    }
  }

  function nearest(xs, wanted) {
    let low = 0, high = xs.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (xs[middle] < wanted) low = middle + 1; else high = middle;
    }
    return low > 0 && Math.abs(xs[low - 1] - wanted) <= Math.abs(xs[low] - wanted) ? low - 1 : low;
  }

  function groupOf(mode, name) {
    if (mode !== "train") return mode === "val" ? "Validation" : mode === "test" ? "Test" : mode;
    if (/(^|[./_])lr([./_\d]|$)|learning_rate/.test(name)) return "Learning rates";
    if (/memory/.test(name)) return "Memory";
    if (/(^|_)time$|_per_second|^mfu|flops|throughput/.test(name)) return "Speed";
    return "Training";
  }

  const COLUMNS = 3;
  const MOST_ROWS = 12; // of the values under the pointer
  const FEW = 20; // Curves of at most this many points have dots.
  const LABELLED = new Set(["Validation", "Test"]);
  const ORDER = ["Training", "Validation", "Test", "Learning rates", "Speed", "Memory"];

  function unitOf(group, name) {
    if (group === "Memory") return "MiB";
    return name === "time" || name === "data_time" ? "seconds per iteration" : "";
  }

  function collect() {
    const groups = new Map();
    runs.forEach((each, run) => {
      for (const [mode, curves] of Object.entries(each.curves)) {
        for (const [name, curve] of Object.entries(curves)) {
          const group = groupOf(mode, name);
          if (!groups.has(group)) groups.set(group, new Map());
          const names = groups.get(group);
          // The rates of all parameter groups share a chart, which also contains the first one under its own name.
          const [, base, number] = name.match(/^(.*)\/group_(\d+)$/) || [];
          if (base === undefined && `${name}/group_0` in curves) continue;
          const title = base === undefined ? name : `${base} of the parameter groups`;
          if (!names.has(title)) names.set(title, []);
          const tint = base !== undefined && runs.length === 1 ? +number : run;
          names.get(title).push({ run, curve, tint, label: base === undefined ? "" : `group ${number}` });
        }
      }
    });
    const rank = (group) => (ORDER.includes(group) ? ORDER.indexOf(group) : ORDER.length);
    return [...groups].sort(([a], [b]) => rank(a) - rank(b));
  }

  function loss(name) { return /(^|[_./])loss/.test(name) ? 0 : 1; }

  function controls(parent) {
    const smoothing = make("label", {}, parent, "smoothing ");
    const slider = make("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: 0, id: "smoothing" }, smoothing);
    const shown = make("output", {}, smoothing, "0");
    slider.addEventListener("input", () => {
      state.smoothing = +slider.value;
      shown.textContent = String(state.smoothing);
      render();
    });
    const logarithmic = make("label", {}, parent);
    const box = make("input", { type: "checkbox", id: "log" }, logarithmic);
    logarithmic.append("log scale");
    box.addEventListener("change", () => { state.log = box.checked; render(); });
    if (runs.length < 2) return;
    const choice = make("div", { class: "runs" }, parent);
    runs.forEach((each, run) => {
      const label = make("label", {}, choice);
      const visible = make("input", { type: "checkbox", checked: "" }, label);
      make("i", { class: `dot c${run % 8}`, style: "margin: 0" }, label);
      label.append(each.name);
      visible.addEventListener("change", () => {
        if (visible.checked) hidden.delete(run); else hidden.add(run);
        render();
      });
    });
  }

  let waiting = false;
  function render() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; for (const chart of charts) chart.render(); });
  }

  // The picture of the sessions of a run: iterations over wall time, with long pauses shortened.
  function lineage(parent, each, run) {
    const sessions = each.lineage.filter((session) => session.ended >= session.began);
    if (!sessions.length) return;
    if (runs.length > 1) {
      const heading = make("h3", {}, parent);
      make("i", { class: `dot c${run % 8}` }, heading);
      heading.append(each.name);
    }
    const svg = draw("svg", { class: "lineage", role: "img" }, parent);
    draw("title", {}, svg, "Iterations over wall time for each session");
    const active = sessions.reduce((sum, s) => sum + (s.ended - s.began), 0) || 1;
    const longest = 0.12 * active;
    const breaks = [];
    let removed = 0, previous = null;
    for (const session of sessions) {
      if (previous !== null && session.began - previous > longest) {
        removed += session.began - previous - longest;
        breaks.push({ after: previous, seconds: session.began - previous });
      }
      session.shift = removed;
      previous = Math.max(previous === null ? -Infinity : previous, session.ended);
    }
    const saves = sessions.reduce((sum, s) => sum + s.saves.length, 0);
    const begin = sessions[0].began;
    const end = Math.max(...sessions.map((s) => s.ended - s.shift)) - begin || 1;
    const all = sessions.flatMap((s) => s.lines.flat().map((p) => p[1]));
    const top = Math.max(1, ...all), bottom = Math.min(top - 1, ...all.concat(top - 1));

    return () => {
      svg.replaceChildren();
      const width = svg.clientWidth || 360, height = width < 500 ? 220 : 270;
      svg.setAttribute("height", height);
      svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      const inner = width - LEFT - 24, tall = height - 20 - BOTTOM;
      const X = (t, session) => LEFT + (inner * (t - session.shift - begin)) / end;
      const Y = (i) => 20 + tall * (1 - (i - bottom) / (top - bottom));
      for (const y of ticks(bottom, top, 4)) {
        draw("line", { class: "gridline", x1: LEFT, x2: width - 12, y1: Y(y), y2: Y(y) }, svg);
        draw("text", { x: LEFT - 6, y: Y(y) + 4, "text-anchor": "end" }, svg, short(y));
      }
      draw("text", { x: LEFT, y: height - 6 }, svg, "start");
      draw("text", { x: width - 12, y: height - 6, "text-anchor": "end" }, svg, `${duration(end + removed)} later`);
      draw("text", { x: LEFT - 6, y: 9, "text-anchor": "end" }, svg, "iteration");
      let last = null, labelled = -Infinity;
      for (const session of sessions) {
        const flat = session.lines.flat();
        const first = flat[0];
        if (last && first) {
          const d = `M${X(last.t, last.session)} ${Y(last.i)}L${X(session.began, session)} ${Y(first[1])}L${X(first[0], session)} ${Y(first[1])}`;
          draw("path", { class: "link", d }, svg);
        } else if (first) {
          draw("path", { class: "link", d: `M${X(session.began, session)} ${Y(first[1])}H${X(first[0], session)}` }, svg);
        }
        session.lines.forEach((line, number) => {
          const next = session.lines[number + 1];
          const kept = Math.min(session.kept === null ? Infinity : session.kept, next ? next[0][1] : Infinity);
          drawLine(svg, line, kept, session, X, Y);
          if (next) {
            const from = line[line.length - 1];
            const d = `M${X(from[0], session)} ${Y(from[1])}L${X(next[0][0], session)} ${Y(next[0][1])}`;
            draw("path", { class: "rollback", d }, svg);
          }
        });
        if (saves <= 60)
          for (const [t, i] of session.saves) draw("circle", { class: "save", cx: X(t, session), cy: Y(i), r: 3 }, svg);
        const point = flat.length ? flat[flat.length - 1] : [session.ended, last ? last.i : bottom];
        const x = X(session.ended, session), y = Y(point[1]);
        const sign = { complete: "●", killed: "✕", failed: "✕", running: "▸" }[session.how] || "■";
        const mark = draw("text", { class: `end ${session.how}`, x, y: y + 5 }, svg, sign);
        draw("title", {}, mark, `session ${session.number}: ${session.label} at iteration ${point[1].toLocaleString("en")}`);
        if (x - labelled > 18 || session === sessions[sessions.length - 1]) {
          draw("text", { x: Math.min(x, width - 14), y: y - 9, "text-anchor": "middle" }, svg, String(session.number));
          labelled = x;
        }
        last = { t: session.ended, i: point[1], session };
      }
      let pauseLabel = LEFT;
      for (const pause of breaks) {
        const session = sessions.find((s) => s.began > pause.after);
        const x = X(session.began, session) - (inner * longest) / end / 2;
        if (x - pauseLabel < 70 || x > width - 130) continue;
        draw("text", { x, y: height - 6, "text-anchor": "middle" }, svg, `⋯ ${duration(pause.seconds)}`);
        pauseLabel = x;
      }
    };
  }

  // The part of a line that led to the current state, and the part after ``kept``, which was trained again.
  function drawLine(svg, line, kept, session, X, Y) {
    const point = ([t, i]) => `${X(t, session).toFixed(1)} ${Y(i).toFixed(1)}`;
    let split = line.findIndex(([, i]) => i > kept);
    if (split < 0) split = line.length;
    if (split > 0) draw("path", { class: "session", d: `M${line.slice(0, split).map(point).join("L")}h0.01` }, svg);
    if (split < line.length) {
      const rest = line.slice(Math.max(0, split - 1));
      draw("path", { class: "session repeated", d: `M${rest.map(point).join("L")}h0.01` }, svg);
    }
  }

  function legend(parent) {
    const rows = [
      ["▬", "training that counted", "var(--good)"], ["▬", "trained again later, or rolled back", "var(--g-repeated)"],
      ["○", "checkpoint", "var(--good)"], ["✕", "killed or failed", "var(--bad)"], ["■", "stopped", "var(--faint)"],
      ["●", "complete", "var(--good)"], ["┄", "start or restart", "var(--faint)"],
    ];
    const box = make("div", { class: "legend" }, parent);
    for (const [sign, text, fill] of rows) {
      const row = make("span", {}, box);
      make("span", { class: "key", style: `color: ${fill}` }, row, sign);
      row.append(text);
    }
  }

  const pictures = document.getElementById("lineages");
  const redraws = runs.map((each, run) => lineage(pictures, each, run)).filter(Boolean);
  if (redraws.length) legend(pictures);
  controls(document.getElementById("controls"));
  const container = document.getElementById("charts");
  const groups = collect();
  // A group of a few charts fills the last row of the group before it.
  let heading = null, grid = null, room = 0;
  for (const [group, names] of groups) {
    if (heading === null || names.size > room) {
      heading = make("h3", {}, container, group);
      grid = make("div", { class: "grid" }, container);
      room = (COLUMNS - (names.size % COLUMNS)) % COLUMNS;
    } else {
      heading.textContent += `, ${group[0].toLowerCase()}${group.slice(1)}`;
      room -= names.size;
    }
    const sorted = [...names].sort(([a], [b]) => loss(a) - loss(b));
    for (const [name, curves] of sorted) {
      const title = LABELLED.has(group) ? `${group.toLowerCase()}: ${name}` : name;
      new Chart(grid, title, curves, unitOf(group, name), group !== "Learning rates");
    }
  }
  if (!groups.length) make("p", { class: "faint" }, container, "No values were logged.");
  const update = () => { for (const redraw of redraws) redraw(); render(); };
  window.addEventListener("resize", update);
  update();
  document.documentElement.dataset.ready = "yes";
})();
