"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const T = data.labels.length, numLayers = data.layers.length, numHeads = data.heads.length;
const MEAN = numHeads > 1 ? numHeads : -1;  // the column of the means over the heads
const SMALL_PIXELS = 64, LISTED = 7, LABELLED_FROM = 11, RULED_FROM = 12;

// ---------------------------------------------------------------- the values
const bytes = (() => {
  const text = atob(data.maps), found = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) found[i] = text.charCodeAt(i);
  return found;
})();
const squares = Float32Array.from({ length: 256 }, (_, i) => (i / 255) ** 2);
const stored = data.bits === 16 ? (i) => (bytes[2 * i] + 256 * bytes[2 * i + 1]) / 65535 : (i) => squares[bytes[i]];
const kept = new Map();  // the last maps that were read

function values(layer, head) {
  const name = `${layer}/${head}`;
  if (!kept.has(name)) {
    if (kept.size > 8) kept.delete(kept.keys().next().value);
    kept.set(name, read(layer, head));
  }
  return kept.get(name);
}

function read(layer, head) {
  const map = new Float32Array(T * T);
  for (const one of head === MEAN ? [...Array(numHeads).keys()] : [head]) {
    const start = (layer * numHeads + one) * T * T;
    for (let i = 0; i < T * T; i++) map[i] += stored(start + i);
  }
  if (head === MEAN) for (let i = 0; i < T * T; i++) map[i] /= numHeads;
  return map;
}

const titleOf = (layer, head) =>
  head === MEAN ? `layer ${data.layers[layer]}, mean of ${numHeads} heads` : data.titles[layer][head];

// --------------------------------------------------------------- the colours
const dark = matchMedia("(prefers-color-scheme: dark)");
let palette = [];

function makePalette() {
  const stops = data.ramps[dark.matches ? "dark" : "light"].map((stop) => [1, 3, 5].map((i) => parseInt(stop.slice(i, i + 2), 16)));
  palette = Array.from({ length: 256 }, (_, i) => {
    const place = (i / 255) * (stops.length - 1), below = Math.min(Math.floor(place), stops.length - 2);
    return [0, 1, 2].map((c) => Math.round(stops[below][c] + (stops[below + 1][c] - stops[below][c]) * (place - below)));
  });
}

const colourOf = (share) => palette[Math.round(255 * Math.min(1, $("lifted").checked ? Math.sqrt(share) : share))];

function paint(canvas, width, height, shareAt) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  for (let y = 0, at = 0; y < height; y++) {
    for (let x = 0; x < width; x++, at += 4) {
      const [red, green, blue] = colourOf(shareAt(y, x));
      image.data[at] = red; image.data[at + 1] = green; image.data[at + 2] = blue; image.data[at + 3] = 255;
    }
  }
  context.putImageData(image, 0, 0);
}

const percent = (value) => `${(100 * value).toFixed(value < 0.0995 ? 1 : 0)} %`;
const finePercent = (value) => `${(100 * value).toFixed(data.bits === 16 ? 2 : 1)} %`;

// ------------------------------------------------------------------ the state
const state = { layer: numLayers - 1, head: MEAN >= 0 ? MEAN : 0, row: -1, column: -1, pinned: -1, cell: 20, fits: true, version: 0 };
let shown = [], isShown = [];  // the token positions that are shown, and whether each one is

function kindOf(position) {
  if (data.special[position]) return "special";
  if (!data.segments.includes(1)) return "";
  return data.segments[position] === 1 ? "second" : data.segments[position] === 0 ? "first" : "";
}

function described(position) {
  const parts = [`position ${position}`, `id ${data.ids[position]}`];
  if (data.special[position]) parts.push("special token");
  else if (data.segments.includes(1)) parts.push(data.segments[position] === 1 ? "second text" : "first text");
  if (data.pieces[position] && data.pieces[position] !== data.labels[position]) parts.push(`“${data.pieces[position]}”`);
  return parts.join(" · ");
}

function element(name, classes, text) {
  const made = document.createElement(name);
  made.className = classes;
  if (text !== undefined) made.textContent = text;
  return made;
}

// ------------------------------------------------------------- the small maps
const smalls = [];

function makeGrid() {
  const heads = [...Array(numHeads).keys()].concat(MEAN >= 0 ? [MEAN] : []);
  if (numLayers * heads.length === 1) { $("overview").hidden = true; return; }
  const size = Math.max(24, Math.min(44, Math.floor(Math.min(470, innerWidth * 0.33) / heads.length)));
  const grid = $("grid");
  grid.style.gridTemplateColumns = `auto repeat(${numHeads}, ${size}px)${MEAN >= 0 ? ` ${size + 8}px` : ""}`;
  grid.append(element("span", "axis row", "layer \\ head"));
  for (const head of heads) grid.append(element("span", head === MEAN ? "axis mean" : "axis", head === MEAN ? "mean" : data.heads[head]));
  for (let layer = 0; layer < numLayers; layer++) {
    grid.append(element("span", "axis row", data.layers[layer]));
    for (const head of heads) {
      const button = element("button", head === MEAN ? "small mean" : "small");
      button.type = "button";
      button.setAttribute("role", "radio");
      button.setAttribute("aria-label", titleOf(layer, head));
      button.title = titleOf(layer, head);
      button.style.width = button.style.height = `${size}px`;
      button.append(document.createElement("canvas"));
      button.addEventListener("click", () => choose(layer, head));
      button.addEventListener("keydown", (event) => {
        const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
        if (!step) return;
        event.preventDefault();
        const next = smalls.find((small) => small.layer === layer + step[0] && small.head === head + step[1]);
        if (next) { choose(next.layer, next.head); next.button.focus(); }
      });
      smalls.push({ layer, head, button });
      grid.append(button);
    }
  }
}

function paintSmall({ layer, head, button }) {
  // Of several cells behind one pixel, the largest value.
  const map = read(layer, head), n = shown.length, size = Math.min(n, SMALL_PIXELS), found = new Float32Array(size * size);
  for (let y = 0; y < n; y++) {
    const line = Math.floor((y * size) / n) * size, from = shown[y] * T;
    for (let x = 0; x < n; x++) {
      const at = line + Math.floor((x * size) / n), value = map[from + shown[x]];
      if (value > found[at]) found[at] = value;
    }
  }
  // The maps share one scale, so that they can be compared; small values are always lifted.
  const canvas = button.firstChild, lifted = $("lifted").checked;
  canvas.style.imageRendering = size <= 32 ? "pixelated" : "auto";
  paint(canvas, size, size, (y, x) => lifted ? found[y * size + x] : Math.sqrt(found[y * size + x]));
}

// -------------------------------------------------------------- the large map
function paintMap() {
  const map = values(state.layer, state.head), n = shown.length;
  let most = 0;
  for (const row of shown) for (const column of shown) most = Math.max(most, map[row * T + column]);
  paint($("canvas"), n, n, (y, x) => (most ? map[shown[y] * T + shown[x]] / most : 0));
  paint($("legend-ramp"), 256, 1, (_, x) => x / 255);
  $("legend-low").textContent = "0 %";
  $("legend-high").textContent = percent(most);
  $("map-title").textContent = titleOf(state.layer, state.head).replace(/^l/, "L");
  $("canvas").setAttribute("aria-label", `Heat map: ${titleOf(state.layer, state.head)}, ${n} by ${n} tokens`);
}

function makeLabels() {
  const rows = $("rows"), columns = $("columns");
  rows.replaceChildren();
  columns.replaceChildren();
  for (const position of shown) {
    for (const [parent, way] of [[rows, "row"], [columns, "column"]]) {
      const name = element("div", `name ${kindOf(position)}`);
      const inner = element("bdi", "", data.labels[position]);
      name.append(inner);
      name.title = `${data.labels[position]} · ${described(position)}`;
      name.addEventListener("pointerenter", () => hover(way === "row" ? position : state.pinned, way === "row" ? -1 : position));
      name.addEventListener("click", () => pin(position));
      parent.append(name);
    }
  }
}

function fittingCell() {
  const room = $("view").clientWidth - $("rows").offsetWidth - 4, height = Math.max(420, innerHeight - 230);
  return Math.max(2, Math.min(40, Math.floor(Math.min(room, Math.max(height, 480)) / shown.length)));
}

function resize(cell, fits = false) {
  state.cell = Math.max(2, Math.min(48, Math.round(cell)));
  state.fits = fits;
  const side = state.cell * shown.length, labelled = state.cell >= LABELLED_FROM;
  $("zoom-size").value = state.cell;
  $("canvas").style.width = $("canvas").style.height = `${side}px`;
  $("cells").style.setProperty("--cell", `${state.cell}px`);
  $("cells").classList.toggle("ruled", state.cell >= RULED_FROM);
  const font = `${Math.max(10.5, Math.min(14, state.cell * 0.72))}px`;
  for (const id of ["rows", "columns"]) {
    $(id).style.fontSize = font;
    $(id).classList.toggle("quiet", !labelled);
    for (const name of $(id).children) {
      name.style[id === "rows" ? "height" : "width"] = `${state.cell}px`;
      name.style.lineHeight = `${state.cell}px`;
    }
  }
  $("map-hint").textContent = "Each row is a token, and shows where it looks. "
    + (shown.length < T ? "Without the special tokens, it sums to less than 100\u00a0%. " : "A row sums to 100\u00a0%. ")
    + (labelled ? "" : "Zoom in to see all labels.");
  mark();
}

function fit() {
  resize(fittingCell(), true);
  // Larger cells have larger names, which take room of their own.
  while ($("scroll").scrollWidth > $("scroll").clientWidth && state.cell > 2) resize(state.cell - 1, true);
}

function zoom(factor) {
  const box = $("scroll"), before = state.cell;
  const middle = [(box.scrollLeft + box.clientWidth / 2) / before, (box.scrollTop + box.clientHeight / 2) / before];
  resize(factor > 1 ? Math.max(before + 1, before * factor) : Math.min(before - 1, before * factor));
  box.scrollLeft = middle[0] * state.cell - box.clientWidth / 2;
  box.scrollTop = middle[1] * state.cell - box.clientHeight / 2;
}

function place(id, box) {
  const style = $(id).style;
  style.display = box ? "block" : "none";
  if (box) [style.left, style.top, style.width, style.height] = box.map((number) => `${number}px`);
}

function mark() {
  const y = shown.indexOf(state.row), x = shown.indexOf(state.column), c = state.cell, side = c * shown.length;
  place("row-mark", y >= 0 ? [0, y * c, side, c] : null);
  place("column-mark", x >= 0 ? [x * c, 0, c, side] : null);
  place("cell-mark", x >= 0 && y >= 0 ? [x * c, y * c, c, c] : null);
  for (const name of document.querySelectorAll(".name.active")) name.classList.remove("active");
  $("rows").children[y]?.classList.add("active");
  $("columns").children[x]?.classList.add("active");
}

// ------------------------------------------------------------------ the tokens
const chips = [];

function makeStrip() {
  data.labels.forEach((label, position) => {
    const token = element("button", `token ${kindOf(position)}`);
    token.append(element("bdi", "", label));
    token.type = "button";
    token.title = described(position);
    token.tabIndex = position === 0 ? 0 : -1;
    token.setAttribute("aria-pressed", "false");
    token.addEventListener("pointerenter", () => hover(position, -1));
    token.addEventListener("focus", () => hover(position, -1));
    token.addEventListener("click", () => pin(position));
    token.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1, Home: -T, End: T }[event.key];
      if (!step) return;
      event.preventDefault();
      const next = chips[Math.max(0, Math.min(T - 1, position + step))];
      token.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
    chips.push(token);
  });
  $("strip").append(...chips);
  $("strip").addEventListener("pointerleave", leave);
}

function hover(row, column) {
  if (row === state.row && column === state.column) return;
  state.row = row;
  state.column = column;
  update();
}

let isUpdating = false;

function update() {  // once for each picture of the screen, however fast the pointer moves
  if (isUpdating) return;
  isUpdating = true;
  requestAnimationFrame(() => { isUpdating = false; showDetail(); mark(); });
}

function leave() { hover(state.pinned, -1); }

function pin(position) {
  state.pinned = state.pinned === position ? -1 : position;
  state.row = position;
  state.column = -1;
  update();
}

const counts = new Map();
for (const label of data.labels) counts.set(label, 1 + (counts.get(label) ?? 0));
const isRepeated = (position) => counts.get(data.labels[position]) > 1;

function list(id, weights, most) {
  const order = shown.map((position, i) => [weights[i], position]).sort((a, b) => b[0] - a[0]).slice(0, LISTED);
  $(id).replaceChildren(...order.map(([value, position]) => {
    const item = document.createElement("li"), bar = element("span", "bar"), fill = document.createElement("i");
    const word = element("bdi", "word", data.labels[position]);
    word.title = described(position);
    if (isRepeated(position)) word.append(element("span", "which", ` ${position}`));
    fill.style.width = `${most ? 100 * value / most : 0}%`;
    bar.append(fill);
    item.append(word, bar, element("span", "share", finePercent(value)));
    return item;
  }));
}

function colourStrip(map, row, column) {
  const token = row >= 0 ? row : column;
  const most = token < 0 ? 0 : Math.max(...shown.map((one) => (row >= 0 ? map[row * T + one] : map[one * T + column])));
  chips.forEach((chip, position) => {
    const value = row >= 0 ? map[row * T + position] : map[position * T + column];
    const colour = token >= 0 && isShown[position] && most ? colourOf(value / most) : null;
    chip.style.backgroundColor = colour ? `rgb(${colour})` : "";
    // Dark colours have a light text, whatever the scheme.
    chip.style.color = colour ? (colour[0] * 0.3 + colour[1] * 0.59 + colour[2] * 0.11 > 135 ? "#10141c" : "#ffffff") : "";
  });
  for (const chip of document.querySelectorAll(".token.active")) chip.classList.remove("active");
  chips[token]?.classList.add("active");
  for (const chip of document.querySelectorAll(".token.pinned")) {
    chip.classList.remove("pinned");
    chip.setAttribute("aria-pressed", "false");
  }
  chips[state.pinned]?.classList.add("pinned");
  chips[state.pinned]?.setAttribute("aria-pressed", "true");
}

let painted = "";  // what the strip is coloured by

function showDetail() {
  const map = values(state.layer, state.head), { row, column, pinned } = state, token = row >= 0 ? row : column;
  const wanted = [row, row >= 0 ? -1 : column, pinned, state.layer, state.head, state.version].join();
  if (wanted !== painted) colourStrip(map, row, column);
  painted = wanted;
  for (const id of ["to", "from"]) $(id).replaceChildren();
  for (const id of ["to-title", "from-title", "detail-facts"]) $(id).textContent = "";
  if (token < 0) {
    $("detail-title").textContent = "";
    $("strip-hint").textContent = "hover one to see where it looks, click to keep it";
    $("detail-facts").textContent = "Hover a token or a cell to see its numbers.";
    return;
  }
  const label = data.labels[token];
  $("strip-hint").textContent = row >= 0 ? `coloured by where “${label}” looks` : `coloured by who looks at “${label}”`;
  if (row >= 0 && column >= 0) {
    $("detail-title").textContent = `“${label}” → “${data.labels[column]}”: ${finePercent(map[row * T + column])}`;
  } else {
    $("detail-title").textContent = `“${label}”`;
  }
  $("detail-facts").textContent = described(token);
  $("to-title").textContent = `“${label}” looks at`;
  const to = shown.map((one) => map[token * T + one]), from = shown.map((one) => map[one * T + token]);
  const longest = Math.max(...to, ...from);
  list("to", to, longest);
  $("from-title").textContent = `Who looks at “${label}”`;
  list("from", from, longest);
}

// ------------------------------------------------------------------ all of it
function choose(layer, head) {
  state.layer = layer;
  state.head = head;
  for (const small of smalls) {
    const chosen = small.layer === layer && small.head === head;
    small.button.setAttribute("aria-checked", String(chosen));
    small.button.tabIndex = chosen ? 0 : -1;
  }
  paintMap();
  showDetail();
}

function showTokens() {
  isShown = data.special.map((special) => !($("no-special").checked && special));
  shown = [...isShown.keys()].filter((position) => isShown[position]);
  makeLabels();
  repaint();
  if (state.fits) fit(); else resize(state.cell);
}

function repaint() {
  state.version++;  // of the colours and the shown tokens
  makePalette();
  for (const small of smalls) paintSmall(small);
  choose(state.layer, state.head);
}

function start() {
  const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
  const heads = data.heads[0] === "mean" ? "mean over the heads" : plural(numHeads, "head");
  $("facts").textContent = [data.model, plural(T, "token"), plural(numLayers, "layer"), heads].filter(Boolean).join(" · ");
  $("precision").textContent = "Each value is the share of its attention that a token gives to another. "
    + (data.bits === 16 ? "Values are rounded to 16 bits: to within 0.001 percentage points."
      : "Values are rounded to 8 bits of their square root: to within 0.4 percentage points, and finer where they are small.");
  if (data.special.every(Boolean) || !data.special.some(Boolean)) $("no-special").disabled = true;
  makeGrid();
  makeStrip();
  showTokens();

  const cells = $("cells");
  const point = (event) => {
    const box = $("canvas").getBoundingClientRect();
    const y = Math.floor((event.clientY - box.top) / state.cell), x = Math.floor((event.clientX - box.left) / state.cell);
    if (y in shown && x in shown) hover(shown[y], shown[x]);
  };
  cells.addEventListener("pointermove", point);
  cells.addEventListener("pointerdown", point);
  $("scroll").addEventListener("pointerleave", leave);
  $("scroll").addEventListener("wheel", (event) => {
    if (!event.ctrlKey) return;
    event.preventDefault();
    zoom(event.deltaY < 0 ? 1.2 : 1 / 1.2);
  }, { passive: false });
  $("zoom-in").addEventListener("click", () => zoom(1.25));
  $("zoom-out").addEventListener("click", () => zoom(1 / 1.25));
  $("zoom-fit").addEventListener("click", () => fit());
  $("zoom-size").addEventListener("input", (event) => resize(Number(event.target.value)));
  $("no-special").addEventListener("change", showTokens);
  $("lifted").addEventListener("change", repaint);
  addEventListener("resize", () => { if (state.fits) fit(); });
  dark.addEventListener("change", repaint);
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") { state.pinned = state.row = state.column = -1; update(); }
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input")) return;
    if (event.key === "+" || event.key === "=") zoom(1.25);
    if (event.key === "-") zoom(1 / 1.25);
    if (event.key === "0") fit();
  });
}

start();
})();
