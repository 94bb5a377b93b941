// The map of trainability: windows, a chosen network, and the loss of the nearest one whose curve is kept.

const map = data.map;
const ZOOMS = 700; // milliseconds
let zooming = 0;

function startMap() {
  const bytes = (words) => Uint8Array.from(atob(words), (letter) => letter.charCodeAt(0));
  const rgb = map.colours.map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  for (const shown of map.windows) {
    shown.cells = bytes(shown.shades);
    shown.levels = decode(shown.curves);
    shown.image = document.createElement("canvas");
    shown.image.width = shown.image.height = map.points;
    const pen = shown.image.getContext("2d");
    const pixels = pen.createImageData(map.points, map.points);
    shown.cells.forEach((shade, i) => {
      // The first row of the cells is the lowest of the picture.
      const place = (map.points - 1 - Math.floor(i / map.points)) * map.points + (i % map.points);
      pixels.data.set([...rgb[shade], 255], 4 * place);
    });
    pen.putImageData(pixels, 0, 0);
  }
  const cells = element("cells");
  cells.addEventListener("click", (event) => {
    const { left, top, width, height } = cells.getBoundingClientRect();
    pick((event.clientX - left) / width, 1 - (event.clientY - top) / height);
  });
  cells.addEventListener("keydown", pressed);
  for (const input of document.querySelectorAll(".zooms input")) {
    input.addEventListener("change", () => enlarge(Number(input.value)));
  }
  drawers.push(drawMap);
  drawMap();
}

// The zoom and the network of the state: columns from the left, rows from below.
function chosen() {
  const zoom = map.windows[state.zoom] ? state.zoom : 0;
  const [column, row] = String(state.at || "").split(",").map(Number);
  const isInside = (cell) => Number.isInteger(cell) && cell >= 0 && cell < map.points;
  const shown = map.windows[zoom];
  if (state.at && isInside(column) && isInside(row)) return { zoom, x: column, y: row, shown };
  // First, a network whose curve is kept, near the middle of the frame.
  const middle = (ends) => Math.floor(((ends[0] + ends[1]) / 2) * map.points);
  const [across, up] = shown.inner ? shown.inner.map(middle) : [map.points >> 1, map.points >> 1];
  const { x, y } = nearestCurve(across, up, shown);
  return { zoom, x, y, shown };
}

function pick(across, up) {
  const { zoom, shown } = chosen();
  const inside = shown.inner && [across, up].every((share, i) => share > shown.inner[i][0] && share < shown.inner[i][1]);
  if (inside) return enlarge(zoom + 1);
  const cell = (share) => Math.min(map.points - 1, Math.max(0, Math.floor(share * map.points)));
  state.at = `${cell(across)},${cell(up)}`;
  keep("zoom", "at");
  drawMap();
}

function pressed(event) {
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
  const { zoom, x, y } = chosen();
  if (event.key in moves) {
    const [across, up] = moves[event.key];
    const within = (cell) => Math.min(map.points - 1, Math.max(0, cell));
    state.at = `${within(x + across)},${within(y + up)}`;
    keep("zoom", "at");
    drawMap();
  } else if (event.key === "+" || event.key === "Enter") enlarge(zoom + 1);
  else if (event.key === "-") enlarge(zoom - 1);
  else return;
  event.preventDefault();
}

function enlarge(zoom) {
  if (!map.windows[zoom]) return;
  const before = chosen().zoom;
  state.zoom = zoom;
  state.at = "";
  saved.at = false;
  keep("zoom");
  cancelAnimationFrame(zooming);
  const step = Math.abs(zoom - before) === 1 && !matchMedia("(prefers-reduced-motion: reduce)").matches;
  if (!step) return drawMap();
  const began = performance.now();
  const move = (now) => {
    const share = Math.min(1, Math.max(0, (now - began) / ZOOMS));
    if (share === 1) return drawMap();
    const eased = share * share * (3 - 2 * share);
    drawBetween(Math.min(zoom, before), zoom > before ? eased : 1 - eased);
    zooming = requestAnimationFrame(move);
  };
  zooming = requestAnimationFrame(move);
}

// A window on its way to the next one: the frame grows until it is the whole.
function drawBetween(zoom, share) {
  const { pen, width, height } = canvas("cells");
  const [outer, inner] = [map.windows[zoom], map.windows[zoom + 1]];
  const [[x0, x1], [y0, y1]] = outer.inner;
  const scale = (1 / (x1 - x0)) ** share;
  const shift = (scale - 1) / (1 / (x1 - x0) - 1);
  const left = -(x0 / (x1 - x0)) * shift * width;
  const top = -((1 - y1) / (y1 - y0)) * shift * height;
  pen.imageSmoothingEnabled = false;
  pen.drawImage(outer.image, left, top, scale * width, scale * height);
  pen.globalAlpha = share;
  pen.drawImage(
    inner.image, left + x0 * scale * width, top + (1 - y1) * scale * height,
    (x1 - x0) * scale * width, (y1 - y0) * scale * height,
  );
}

// The learning rate at a share of a window's side, with digits enough to tell neighbours apart.
function rate(ends, share, zoom) {
  const level = ends[0] + (ends[1] - ends[0]) * share;
  return (10 ** level).toFixed(Math.max(0, 2 + zoom - Math.floor(level)));
}

function rates(x, y, shown) {
  const [zoom, middle] = [map.windows.indexOf(shown), (cell) => (cell + 0.5) / map.points];
  return { second: rate(shown.second, middle(x), zoom), first: rate(shown.first, middle(y), zoom) };
}

// The kept curves are those of a lattice of cells: the nearest that ends as the chosen network does.
function nearestCurve(x, y, shown) {
  const learns = (column, row) => shown.cells[row * map.points + column] < 128;
  const cellOf = (k) => Math.floor(((2 * k + 1) * map.points) / (2 * map.side));
  let best = null;
  for (let k = 0; k < map.side ** 2; k++) {
    const [column, row] = [cellOf(k % map.side), cellOf(Math.floor(k / map.side))];
    const apart = Math.hypot(column - x, row - y) + (learns(column, row) === learns(x, y) ? 0 : 2 * map.points);
    if (!best || apart < best.apart) best = { apart, k, x: column, y: row };
  }
  return best;
}

function describeMap({ zoom, x, y, shown }) {
  const count = (map.points ** 2).toLocaleString("en");
  const times = (map.enlarged ** zoom).toLocaleString("en");
  element("share").textContent = text(zoom ? "map.share_zoomed" : "map.share", { share: shown.share, count, times });
  const shade = shown.cells[y * map.points + x];
  const learns = shade < 128;
  const faster = learns ? 1 - shade / 127 : (shade - 128) / 127;
  element("outcome").textContent = text(learns ? "map.learns" : "map.fails", {
    ...rates(x, y, shown), rank: `${Math.round(100 * faster)}\u00a0%`,
  });
  element("outcome").className = learns ? "outcome learns" : "outcome fails";
  const near = nearestCurve(x, y, shown);
  element("nearest").textContent = text("map.curve", { count: map.side ** 2, ...rates(near.x, near.y, shown) });
  const [second, first] = [shown.second, shown.first].map((ends) => [rate(ends, 0, zoom), rate(ends, 1, zoom)]);
  element("axes").textContent = text("map.axes", {
    second_low: second[0], second_high: second[1], first_low: first[0], first_high: first[1],
  });
  for (const input of document.querySelectorAll(".zooms input")) input.checked = Number(input.value) === zoom;
}

function drawMap() {
  const now = chosen();
  describeMap(now);
  drawCells(now);
  drawKept(now);
}

function drawCells({ x, y, shown }) {
  const { pen, width, height } = canvas("cells");
  pen.imageSmoothingEnabled = false;
  pen.drawImage(shown.image, 0, 0, width, height);
  if (shown.inner) {
    const [[x0, x1], [y0, y1]] = shown.inner;
    for (const [stroke, thick] of [["rgb(0 0 0 / .8)", 4], ["#fff", 2]]) {
      pen.strokeStyle = stroke;
      pen.lineWidth = thick;
      pen.strokeRect(x0 * width, (1 - y1) * height, (x1 - x0) * width, (y1 - y0) * height);
    }
  }
  const place = (cell) => [((cell.x + 0.5) / map.points) * width, (1 - (cell.y + 0.5) / map.points) * height];
  const spot = place({ x, y });
  for (const [fill, radius] of [["#000", 4.5], ["#fff", 3]]) {
    pen.fillStyle = fill;
    disc(pen, place(nearestCurve(x, y, shown)), radius);
  }
  for (const [stroke, thick, radius] of [["#000", 4.5, 7], ["#fff", 2.2, 7]]) {
    pen.beginPath();
    pen.arc(...spot, radius, 0, 2 * Math.PI);
    pen.strokeStyle = stroke;
    pen.lineWidth = thick;
    pen.stroke();
  }
}

function drawKept({ x, y, shown }) {
  const { pen, width, height, colour } = canvas("curve");
  const box = { left: 52, right: width - 18, top: 16, bottom: height - 38 };
  const near = nearestCurve(x, y, shown);
  const count = shown.levels.length / map.side ** 2;
  const from = count * near.k;
  const levels = [...shown.levels.subarray(from, from + count)].map((level) => level * map.decades);
  const finite = levels.filter((level) => !Number.isNaN(level));
  const low = Math.max(-map.decades, Math.min(-1, ...finite.map(Math.floor)));
  const high = Math.min(map.decades, Math.max(1, ...finite.map(Math.ceil)));
  const across = (i) => box.left + ((i * map.every) / map.steps) * (box.right - box.left);
  const down = (level) => box.bottom - ((level - low) / (high - low)) * (box.bottom - box.top);
  pen.strokeStyle = colour("line");
  pen.fillStyle = colour("grey");
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  const every = Math.ceil((high - low) / 5);
  for (let level = Math.ceil(low / every) * every; level <= high; level += every) {
    pen.beginPath();
    pen.moveTo(box.left, down(level));
    pen.lineTo(box.right, down(level));
    pen.stroke();
    pen.fillText(level ? `10${superscript(level)}` : "1", box.left - 9, down(level));
  }
  pen.textBaseline = "top";
  pen.textAlign = "center";
  for (const step of [0, 0.25, 0.5, 0.75, 1]) pen.fillText(String(step * map.steps), across((step * map.steps) / map.every), box.bottom + 8);
  pen.textAlign = "right";
  pen.fillText(text("map.steps"), box.right, box.bottom + 23);
  pen.beginPath();
  for (const [i, level] of levels.entries()) {
    if (Number.isNaN(level) || (i && levels[i - 1] >= map.decades)) break; // larger losses are not kept
    if (i) pen.lineTo(across(i), down(level));
    else pen.moveTo(across(i), down(level));
  }
  pen.strokeStyle = colour(shown.cells[near.y * map.points + near.x] < 128 ? "full" : "bad");
  pen.lineWidth = 1.8;
  pen.lineJoin = "round";
  pen.stroke();
}

function superscript(number) {
  const digits = "⁰¹²³⁴⁵⁶⁷⁸⁹";
  return (number < 0 ? "⁻" : "") + [...String(Math.abs(number))].map((digit) => digits[digit]).join("");
}

if (map) startMap();
