"use strict";
// Row r of the table is the prediction made after token r: token i wears the colour of row i - 1.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id);
const signals = new Map(data.signals.map(signal => [signal.name, signal]));
const columns = new Map();
const state = { signal: data.chosen, domain: "", excerpt: 0, token: null, alone: false };
let offset = 0;
for (const one of data.excerpts) { one.offset = offset; offset += one.tokens.length; }

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function column(name) {
  if (!columns.has(name)) {
    const bytes = Uint8Array.from(atob(data.columns[name] || ""), letter => letter.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    columns.set(name, Float32Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true)));
  }
  return columns.get(name);
}

function format(value, digits = 4) {
  if (Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  const written = size >= 1e4 ? Math.round(value).toLocaleString("en") : size && size < 1e-4
    ? value.toExponential(2) : String(Number(value.toPrecision(digits)));
  return written.replaceAll("-", "−");
}

// A plain number's unit is written 1 in the table; a reader needs none.
for (const signal of data.signals) signal.unit = signal.unit === "1" ? "" : signal.unit.replace("^2", "²");

const layered = name => /^router\..*\./.test(name);
const named = name => layered(name) ? name : name.replaceAll("_", " ");

function visible(token) {
  if (!data.text) return String(token);
  return token.replace(/[\u0000-\u0008\u000b-\u001f]/g, sign => String.fromCharCode(0x2400 + sign.charCodeAt(0)))
    .replaceAll("\u007f", "␡").replace(/[\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g, "·") || "∅";
}

const quoted = token => data.text
  ? "“" + visible(token).replaceAll("\n", "↵").replaceAll("\t", "⇥") + "”" : "token " + token;

// How many of the signal's cuts lie below the value, as a step of the scale: 0 to 6, or -4 to 4.
function step(signal, value) {
  if (Number.isNaN(value)) return null;
  const size = signal.signed ? Math.abs(value) : value;
  const above = signal.cuts.filter(cut => size > cut).length;
  return (signal.signed && value < 0 ? -1 : 1) * shade(signal, above);
}

// The colour of a value above so many of the cuts; where cuts fell together there are fewer colours, as far apart.
const shade = ({ cuts, signed }, above) => cuts.length ? Math.round(above * (signed ? 4 : 6) / cuts.length) : 0;

function colour(signal, level) {
  if (level === null) return "transparent";
  if (level === 0) return "var(--c0)";
  return signal.signed ? `var(--${level < 0 ? "n" : "p"}${Math.abs(level)})` : `var(--c${level})`;
}

// The strongest steps are dark in a light page and light in a dark one: their text needs the other ink.
const dark = matchMedia("(prefers-color-scheme: dark)");
const strong = (signal, level) => Math.abs(level) >= (signal.signed ? 4 : 6) - (dark.matches ? 1 : 0);
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const painted = name => name.startsWith("var(") ? css(name.slice(4, -1)) : name;

function tableHead(names) {
  return element("thead", {}, element("tr", {}, ...names.map(name => element("th", { textContent: name, scope: "col" }))));
}

function fillHeader() {
  byId("facts").append(...data.facts.map(([name, value]) =>
    element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value }))));
  byId("notes").append(...data.notes.map(note => element("li", { textContent: note })));
  const { head, rows } = data.overview;
  const health = head.indexOf("health");
  byId("overview").append(
    tableHead(head),
    element("tbody", {}, ...rows.map(row => element("tr", {}, ...row.map((cell, at) =>
      element("td", {}, element("span", { textContent: cell, className: at === health ? cell : "" })))))));
}

function fillGlossary() {
  byId("glossary").append(
    tableHead(["signal", "unit", ...data.domains, "all", ""]),
    element("tbody", {}, ...data.signals.map(signal => element("tr", {},
      element("td", { textContent: named(signal.name) }), element("td", { textContent: signal.unit }),
      ...signal.means.map(mean => element("td", { textContent: mean })),
      element("td", { textContent: signal.description, className: "words" })))));
}

function fillControls() {
  const option = (value, textContent) => element("option", { value, textContent });
  const plain = data.signals.filter(signal => !layered(signal.name));
  const layers = data.signals.filter(signal => layered(signal.name));
  byId("signal").append(...plain.map(signal => option(signal.name, named(signal.name))));
  if (layers.length) byId("signal").append(element("optgroup", { label: "Routers, layer by layer" },
    ...layers.map(signal => option(signal.name, signal.name))));
  byId("signal").value = state.signal;
  byId("signal").onchange = event => { choose(event.target.value); };
  byId("domain").append(option("", "all domains"), ...data.domains.map(name => option(name, name)));
  byId("domain").onchange = event => { state.domain = event.target.value; fillDocuments(); };
  byId("document").onchange = event => { open(Number(event.target.value)); };
  byId("previous").onclick = () => turn(-1);
  byId("next").onclick = () => turn(1);
  byId("alone").onchange = event => { state.alone = event.target.checked; drawPlane(); };
}

const listed = () => data.excerpts.flatMap((one, at) => !state.domain || one.domain === state.domain ? [at] : []);

function fillDocuments() {
  byId("document").replaceChildren(...listed().map(at => {
    const one = data.excerpts[at], length = one.stop - one.start;
    const part = length < one.total ? `tokens ${one.start}–${one.stop - 1} of ${one.total}` : `${length} tokens`;
    return element("option", { value: at, textContent: `${one.name} (${part})` });
  }));
  if (listed().length) open(listed().includes(state.excerpt) ? state.excerpt : listed()[0]);
  else drawPlane();
}

function turn(by) {
  const all = listed(), at = all.indexOf(state.excerpt) + by;
  if (at >= 0 && at < all.length) open(all[at]);
}

function open(at) {
  state.excerpt = at;
  state.token = null;
  const one = data.excerpts[at], all = listed();
  byId("document").value = at;
  byId("previous").disabled = all[0] === at;
  byId("next").disabled = all.at(-1) === at;
  byId("text").classList.toggle("ids", !data.text);
  byId("text").scrollTop = 0;
  byId("text").replaceChildren(...one.tokens.map((token, i) => element("span", {
    textContent: visible(token), tabIndex: i ? -1 : 0,
    className: data.text && token.includes("\n") ? "break" : "" })));
  paint();
  describe(null);
  drawPlane();
}

function choose(name) {
  state.signal = name;
  byId("signal").value = name;
  for (const one of document.querySelectorAll(".histogram")) one.setAttribute("aria-pressed", one.name === name);
  drawLegend();
  paint();
  describe(state.token);
  drawPlane();
}

function paint() {
  const one = data.excerpts[state.excerpt], signal = signals.get(state.signal);
  if (!one || !signal) return;
  const values = column(signal.name);
  [...byId("text").children].forEach((span, i) => {
    const level = i ? step(signal, values[one.offset + i - 1]) : null;
    span.style.background = level ? colour(signal, level) : "";
    span.style.color = strong(signal, level) ? dark.matches ? "var(--on-light)" : "var(--on-dark)" : "";
  });
}

function drawLegend() {
  const signal = signals.get(state.signal);
  if (!signal) return;
  const { cuts, signed } = signal;
  const numbers = signed ? [...cuts.map(cut => -cut).reverse(), ...cuts] : cuts;
  const levels = Array.from({ length: numbers.length + 1 }, (_, i) => shade(signal, signed ? i - cuts.length : i));
  byId("legend").replaceChildren(
    element("div", { textContent: `${named(signal.name)}${signal.unit ? ", " + signal.unit : ""}: ` +
      "how each token was predicted; steps at the run's quantiles" }),
    element("div", { className: "steps" }, ...levels.map(level => {
      const swatch = element("i");
      swatch.style.background = colour(signal, level);
      return swatch;
    })),
    element("div", { className: "cuts" }, ...numbers.map((number, i) => {
      const made = element("span", { textContent: format(number, 3) });
      made.style.left = `${100 * (i + 1) / levels.length}%`;
      return made;
    })));
}

function describe(i) {
  state.token = i;
  const one = data.excerpts[state.excerpt], panel = byId("values");
  byId("text").querySelector(".chosen")?.classList.remove("chosen");
  if (i === null || !one) {
    ring();
    panel.replaceChildren(element("p", { textContent: "Point at a token, or move with the arrow keys, to read its values." }));
    return;
  }
  byId("text").children[i].classList.add("chosen");
  const at = one.start + i, row = one.offset + i;
  const value = (name, r, there) => element("td", { textContent: there ? format(column(name)[r]) : "–" });
  ring();
  panel.replaceChildren(
    element("h3", { textContent: quoted(one.tokens[i]) }),
    element("p", { textContent: `token ${at} of ${one.name}, ${one.domain}` }),
    element("table", {},
      tableHead(["", `predicted it\nrow ${at ? at - 1 : "–"}`, `after it\nrow ${at}`]),
      element("tbody", {}, ...data.signals.map(({ name }) => {
        const made = element("tr", { className: name === state.signal ? "now" : "" },
          element("td", { textContent: named(name) }), value(name, row - 1, i > 0), value(name, row, true));
        made.dataset.signal = name;
        return made;
      }))));
}

function goTo(excerpt, i) {
  if (excerpt !== state.excerpt) {
    if (state.domain && data.excerpts[excerpt].domain !== state.domain) {
      state.domain = byId("domain").value = "";
      state.excerpt = excerpt;
      fillDocuments();
    } else open(excerpt);
  }
  const span = byId("text").children[i];
  byId("text").scrollTop = span.offsetTop - byId("text").offsetTop - byId("text").clientHeight / 2;
  span.focus({ preventScroll: true });
}

function tip(span, i) {
  const one = data.excerpts[state.excerpt], box = span.getClientRects()[0], mark = byId("tip");
  if (!box || !state.signal) return;
  const value = i ? format(column(state.signal)[one.offset + i - 1]) : "–";
  mark.textContent = `${quoted(one.tokens[i])}  ${named(state.signal)} ${value}`;
  mark.hidden = false;
  mark.style.left = `${Math.min(box.left, innerWidth - mark.offsetWidth - 8)}px`;
  mark.style.top = `${box.top > 40 ? box.top - mark.offsetHeight - 5 : box.bottom + 5}px`;
}

function listenToText() {
  const text = byId("text");
  const place = target => target.parentElement === text ? [...text.children].indexOf(target) : -1;
  text.addEventListener("mouseover", event => {
    const i = place(event.target);
    if (i >= 0) { describe(i); tip(event.target, i); }
  });
  text.addEventListener("mouseleave", () => { byId("tip").hidden = true; });
  text.addEventListener("scroll", () => { byId("tip").hidden = true; });
  text.addEventListener("focusin", event => {
    const i = place(event.target);
    if (i < 0) return;
    for (const span of text.querySelectorAll("[tabindex='0']")) span.tabIndex = -1;
    event.target.tabIndex = 0;
    describe(i);
    tip(event.target, i);
  });
  text.addEventListener("keydown", event => {
    const to = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
    const next = to && event.target[to];
    if (next) { event.preventDefault(); next.focus(); }
  });
}

function fillWorst() {
  const against = data.worst.length && "nll_increase" in data.worst[0].signals;
  byId("worst-section").hidden = !data.worst.length;
  byId("worst-lead").textContent = "Tokens that came where the model had given more than half of its mass to another one, " +
    `over the whole run; highest ${against ? "increase of the NLL over the base" : "NLL"} first. Click one to read it in its place.`;
  byId("worst").append(...data.worst.map(one => {
    const figures = Object.entries(one.signals).map(([name, value]) => `${named(name)} ${value}`).join(" · ");
    const plain = token => visible(token).replaceAll("\n", "↵").replaceAll("\t", " ");
    const button = element("button", { type: "button", disabled: one.excerpt === null },
      element("span", { className: "context" },
        element("span", { className: "before" }, element("bdi", { textContent: plain(one.before) })),
        element("mark", {}, element("bdi", { textContent: plain(one.token) }))),
      element("small", { textContent: `${one.name}, token ${one.position + 1} · ${figures}` }));
    button.onclick = () => {
      goTo(one.excerpt, one.position + 1 - data.excerpts[one.excerpt].start);
      byId("reader").scrollIntoView();
    };
    return element("li", {}, button);
  }));
}

fillHeader();
fillGlossary();
fillControls();
fillHistograms();
fillWorst();
listenToText();
listenToPlane();
fillDocuments();
if (state.signal) choose(state.signal);
drawHistograms();
dark.addEventListener("change", () => { paint(); drawPlane(); drawHistograms(); });
addEventListener("resize", () => { drawPlane(); drawHistograms(); });
