"use strict";
// The (H, V) plane and the histograms, on canvas.
function fresh(canvas) {
  const scale = devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  pen.font = "11px system-ui, 'DejaVu Sans', sans-serif";
  return { pen, width, height };
}

const drawn = [];
let frame = { left: 34, right: 8, top: 8, bottom: 30 }, scaleX = null, scaleY = null;

function ticks(high) {
  const raw = high / 5 || 1, power = 10 ** Math.floor(Math.log10(raw));
  const by = power * [1, 2, 2.5, 5, 10].find(factor => factor * power >= raw);
  return Array.from({ length: Math.floor(high / by) + 1 }, (_, i) => i * by);
}

function drawAxes(pen, width, height, highX, highY) {
  pen.fillStyle = css("--faint");
  pen.strokeStyle = css("--line");
  pen.lineWidth = 1;
  for (const tick of ticks(highX)) {
    pen.beginPath(); pen.moveTo(scaleX(tick), frame.top); pen.lineTo(scaleX(tick), height - frame.bottom); pen.stroke();
    pen.textAlign = "center"; pen.fillText(format(tick), scaleX(tick), height - frame.bottom + 13);
  }
  for (const tick of ticks(highY)) {
    pen.beginPath(); pen.moveTo(frame.left, scaleY(tick)); pen.lineTo(width - frame.right, scaleY(tick)); pen.stroke();
    pen.textAlign = "right"; pen.fillText(format(tick), frame.left - 5, scaleY(tick) + 4);
  }
  pen.textAlign = "right"; pen.fillText("H, nats", width - frame.right, height - 3);
  pen.textAlign = "left"; pen.fillText("V, nats²", frame.left + 4, frame.top + 9);
}

function planePoints() {
  drawn.length = 0;
  const signal = signals.get(state.signal), H = column("entropy"), V = column("varentropy"), tint = column(signal.name);
  data.excerpts.forEach((one, at) => {
    if (state.domain && one.domain !== state.domain || state.alone && at !== state.excerpt) return;
    for (let i = 0; i < one.tokens.length; i++) {
      const r = one.offset + i;
      if (Number.isFinite(H[r]) && Number.isFinite(V[r]))
        drawn.push({ excerpt: at, row: i, h: H[r], v: V[r], level: step(signal, tint[r]) });
    }
  });
  return signal;
}

function drawPlane() {
  if (!signals.has("entropy") || !signals.has("varentropy")) { byId("plane-figure").hidden = true; return; }
  const { pen, width, height } = fresh(byId("plane")), signal = planePoints();
  const highX = drawn.reduce((most, one) => Math.max(most, one.h), 1e-3) * 1.03;
  const highY = drawn.reduce((most, one) => Math.max(most, one.v), 1e-3) * 1.03;
  scaleX = h => frame.left + h / highX * (width - frame.left - frame.right);
  scaleY = v => height - frame.bottom - v / highY * (height - frame.top - frame.bottom);
  drawAxes(pen, width, height, highX, highY);
  const size = drawn.length > 5000 ? 1.4 : drawn.length > 800 ? 2 : 2.8;
  const rank = one => one.level === null ? -1 : Math.abs(one.level);
  const paints = new Map();
  for (const one of [...drawn].sort((a, b) => rank(a) - rank(b))) {
    const name = one.level ? colour(signal, one.level) : "var(--point)";
    if (!paints.has(name)) paints.set(name, painted(name));
    pen.fillStyle = paints.get(name);
    pen.globalAlpha = one.level ? .9 : .5;
    pen.beginPath(); pen.arc(scaleX(one.h), scaleY(one.v), size, 0, 7); pen.fill();
  }
  pen.globalAlpha = 1;
  ring();
}

function ring() {
  const here = state.token && drawn.find(one => one.excerpt === state.excerpt && one.row === state.token - 1);
  byId("ring").hidden = !here;
  if (here) Object.assign(byId("ring").style, { left: `${scaleX(here.h)}px`, top: `${scaleY(here.v)}px` });
}

function listenToPlane() {
  byId("plane").onclick = event => {
    let best = null, least = 14 ** 2;
    for (const one of drawn) {
      const far = (scaleX(one.h) - event.offsetX) ** 2 + (scaleY(one.v) - event.offsetY) ** 2;
      if (far < least) { least = far; best = one; }
    }
    if (best) goTo(best.excerpt, Math.min(best.row + 1, data.excerpts[best.excerpt].tokens.length - 1));
  };
}

function drawHistogram(canvas, signal) {
  const { pen, width, height } = fresh(canvas), base = height - 15;
  const shares = signal.counts.map(counts => {
    const total = counts.reduce((sum, count) => sum + count, 0) || 1;
    return counts.map(count => count / total);
  });
  const most = Math.max(1e-9, ...shares.flat());
  shares.forEach((share, d) => {
    pen.strokeStyle = pen.fillStyle = css(`--d${d % 6}`);
    pen.beginPath(); pen.moveTo(0, base);
    share.forEach((part, i) => {
      const y = base - part / most * (base - 4);
      pen.lineTo(i * width / share.length, y); pen.lineTo((i + 1) * width / share.length, y);
    });
    pen.lineTo(width, base);
    pen.globalAlpha = .14; pen.fill(); pen.globalAlpha = 1; pen.lineWidth = 1.4; pen.stroke();
  });
  pen.fillStyle = css("--faint");
  pen.textAlign = "left"; pen.fillText(format(signal.low), 0, height - 2);
  pen.textAlign = "right"; pen.fillText(format(signal.high), width, height - 2);
}

function fillHistograms() {
  byId("domains").append(...data.domains.map((name, d) => {
    const made = element("span", { textContent: name });
    made.style.setProperty("--mark", `var(--d${d % 6})`);
    return made;
  }));
  const layers = byId("layers");
  for (const signal of data.signals) {
    const canvas = element("canvas"), button = element("button", { type: "button", className: "histogram", name: signal.name },
      element("b", { textContent: named(signal.name) }), " ",
      element("i", { textContent: signal.unit }), canvas);
    button.onclick = () => choose(signal.name);
    button.draw = () => drawHistogram(canvas, signal);
    (layered(signal.name) ? layers.querySelector("div") : byId("histograms")).append(button);
  }
  layers.hidden = !layers.querySelector("button");
  layers.addEventListener("toggle", drawHistograms);
}

function drawHistograms() {
  for (const one of document.querySelectorAll(".histogram")) if (one.offsetWidth) one.draw();
}
