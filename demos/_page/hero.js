// The first picture: what a learning rate does, for three batch sizes.

const hero = data.hero;
const NAMES = ["single", "mini", "full"];
const MOVES = 2600; // milliseconds
const LEVELS = [0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100];
let shownUpTo = 1; // the share of the frames that is drawn
let moving = 0;

for (const run of hero.runs) {
  run.places = decode(run.weights);
  run.levels = decode(run.gaps);
}

const rateIndex = () => hero.lrs.indexOf(state.lr);
const runIndex = () => hero.runs.findIndex((run) => run.batch === state.batch);

function sentence() {
  const run = hero.runs[runIndex()];
  const i = rateIndex();
  const kind = run.kinds[i];
  const values = {
    lr: state.lr, batch: run.batch, end: run.ends[i], best: run.best, best_end: run.best_end,
    first: run.first_divergent, limit: hero.limit, passes: hero.passes, count: hero.lrs.length,
  };
  const reason = kind === "diverges" ? `diverges_${NAMES[runIndex()]}` : kind;
  return { kind, verdict: text(kind === "diverges" ? "hero.diverges" : "hero.ends", values), reason: text(`hero.${reason}`, values) };
}

function describe() {
  const { kind, verdict, reason } = sentence();
  element("verdict").textContent = verdict;
  element("reason").textContent = reason;
  element("says").className = kind === "diverges" ? "says diverges" : "says";
  const slider = element("lr");
  slider.value = rateIndex();
  slider.setAttribute("aria-valuetext", `${verdict} ${reason}`);
  element("shown").textContent = state.lr;
  const run = hero.runs[runIndex()];
  document.querySelector(".track").className = `track ${NAMES[runIndex()]}`;
  [...element("bars").children].forEach((bar, i) => {
    bar.style.setProperty("--height", run.heights[i]);
    bar.className = [run.kinds[i] === "diverges" ? "diverges" : "", i === rateIndex() ? "here" : ""].join(" ");
  });
  for (const input of document.querySelectorAll(".batches input")) input.checked = Number(input.value) === state.batch;
  const every = run.steps[run.steps.length - 1] - run.steps[run.steps.length - 2];
  element("dots").textContent = every > 1 ? text("hero.dots", { every }) : "";
}

// The contours of a quadratic loss are ellipses. Outside of each it is a shade darker.
function drawContours(pen, place, scale, width, height, colour) {
  const [first] = hero.directions;
  const turn = -Math.atan2(first[1], first[0]);
  const [x, y] = place(...hero.minimizer);
  pen.fillStyle = pen.strokeStyle = colour("bowl");
  pen.lineWidth = 0.8;
  for (const level of LEVELS) {
    const [a, b] = hero.curvatures.map((curvature) => scale * Math.sqrt(level / curvature));
    pen.beginPath();
    pen.ellipse(x, y, a, b, turn, 0, 2 * Math.PI);
    pen.globalAlpha = 0.3;
    pen.stroke();
    pen.rect(0, 0, width, height);
    pen.globalAlpha = 0.028;
    pen.fill("evenodd");
  }
  pen.globalAlpha = 1;
}

function labelContours(pen, place, scale, width, height, colour) {
  const [first, second] = hero.directions;
  pen.font = `11px ${colour("sans")}`;
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  for (const [level, words] of [[0.1, "10 %"], [1, "100 %"], [10, "1000 %"]]) {
    const [a, b] = hero.curvatures.map((curvature) => Math.sqrt(level / curvature));
    let best = null;
    for (let turn = 0; turn < 2 * Math.PI; turn += 0.05) {
      const along = a * Math.cos(turn);
      const across = b * Math.sin(turn);
      const [x, y] = place(
        hero.minimizer[0] + along * first[0] + across * second[0],
        hero.minimizer[1] + along * first[1] + across * second[1],
      );
      const inside = x > 28 && x < width - 28 && y > 14 && y < height - 14;
      if (inside && (!best || x + y > best[0] + best[1])) best = [x, y];
    }
    if (!best) continue;
    pen.strokeStyle = colour("raised");
    pen.lineWidth = 4;
    pen.globalAlpha = 0.8;
    pen.strokeText(words, ...best);
    pen.globalAlpha = 1;
    pen.fillStyle = colour("grey");
    pen.fillText(words, ...best);
  }
}

function drawPath() {
  const { pen, width, height, colour } = canvas("path");
  const [[x0, x1], [y0, y1]] = hero.view;
  const scale = Math.min(width / (x1 - x0), height / (y1 - y0));
  const [middleX, middleY] = hero.middle;
  const place = (x, y) => [width / 2 + (x - middleX) * scale, height / 2 - (y - middleY) * scale];
  drawContours(pen, place, scale, width, height, colour);
  labelContours(pen, place, scale, width, height, colour);
  const run = hero.runs[runIndex()];
  const ink = colour(NAMES[runIndex()]);
  const frames = run.steps.length;
  const from = 2 * frames * rateIndex();
  const last = Math.max(0, Math.round(shownUpTo * (frames - 1)));
  const point = (frame) => {
    const [x, y] = [run.places[from + 2 * frame], run.places[from + 2 * frame + 1]];
    return place(middleX + hero.reach * x, middleY + hero.reach * y);
  };
  const line = [];
  const dots = [];
  for (let frame = 0; frame <= last; frame++) {
    const spot = point(frame);
    if (Number.isNaN(spot[0])) break;
    const apart = frame > 0 && run.steps[frame] - run.steps[frame - 1] > 1;
    (apart ? dots : line).push(spot);
  }
  pen.lineJoin = "round";
  const dense = line.length > 60;
  for (const [stroke, thick] of [[colour("raised"), dense ? 3 : 5], [ink, dense ? 1.25 : 2.2]]) {
    pen.beginPath();
    line.forEach(([x, y], i) => (i ? pen.lineTo(x, y) : pen.moveTo(x, y)));
    pen.strokeStyle = stroke;
    pen.lineWidth = thick;
    pen.globalAlpha = stroke === ink ? 1 : 0.7;
    pen.stroke();
  }
  pen.globalAlpha = 1;
  pen.fillStyle = ink;
  if (!dense) for (const spot of line) disc(pen, spot, 2.6);
  pen.globalAlpha = 0.55;
  for (const spot of dots) disc(pen, spot, 1.5);
  pen.globalAlpha = 1;
  ring(pen, place(...hero.start), colour("ink"), colour("raised"));
  const end = (dots.length ? dots : line).at(-1);
  pen.fillStyle = colour("raised");
  disc(pen, end, 7);
  pen.fillStyle = ink;
  disc(pen, end, 5);
  cross(pen, place(...hero.minimizer), colour("ink"), colour("raised"));
}

function disc(pen, [x, y], radius) {
  pen.beginPath();
  pen.arc(x, y, radius, 0, 2 * Math.PI);
  pen.fill();
}

function ring(pen, [x, y], stroke, fill) {
  pen.beginPath();
  pen.arc(x, y, 5, 0, 2 * Math.PI);
  pen.fillStyle = fill;
  pen.fill();
  pen.strokeStyle = stroke;
  pen.lineWidth = 1.6;
  pen.stroke();
}

function cross(pen, [x, y], stroke, halo) {
  for (const [colour, thick] of [[halo, 4], [stroke, 1.8]]) {
    pen.beginPath();
    pen.moveTo(x - 7, y);
    pen.lineTo(x + 7, y);
    pen.moveTo(x, y - 7);
    pen.lineTo(x, y + 7);
    pen.strokeStyle = colour;
    pen.lineWidth = thick;
    pen.stroke();
  }
}

function drawLoss() {
  const { pen, width, height, colour } = canvas("loss");
  const box = { left: 62, right: width - 74, top: 18, bottom: height - 40 };
  const [low, high] = [-4.2, 2.2]; // decades of the gap
  // A root's axis has room for the first pass and for the last ones.
  const across = (samples) => box.left + Math.sqrt(samples / hero.months / hero.passes) * (box.right - box.left);
  const down = (level) => box.bottom - ((level - low) / (high - low)) * (box.bottom - box.top);
  drawAxes(pen, box, across, down, colour);
  pen.save();
  pen.beginPath();
  pen.rect(box.left - 6, box.top - 8, box.right - box.left + 12, box.bottom - box.top + 9);
  pen.clip();
  const chosen = runIndex();
  const order = hero.runs.map((_, i) => i).sort((i) => (i === chosen ? 1 : -1));
  const ends = [];
  for (const i of order) {
    drawCurve(pen, hero.runs[i], i === chosen, colour(NAMES[i]), across, down);
    ends.push({ i, y: Math.min(box.bottom - 4, Math.max(box.top, down(lastLevel(hero.runs[i])))) });
  }
  pen.restore();
  ring(pen, [box.left, down(Math.log10(hero.start_gap))], colour("ink"), colour("raised"));
  labelEnds(pen, ends, box, chosen, colour);
}

function drawAxes(pen, box, across, down, colour) {
  pen.strokeStyle = colour("line");
  pen.fillStyle = colour("grey");
  pen.lineWidth = 1;
  pen.textBaseline = "middle";
  pen.textAlign = "right";
  for (const [level, words] of [[-4, "0.01 %"], [-3, "0.1 %"], [-2, "1 %"], [-1, "10 %"], [0, "100 %"], [1, "1000 %"], [2, "10⁴ %"]]) {
    pen.beginPath();
    pen.moveTo(box.left, down(level));
    pen.lineTo(box.right, down(level));
    pen.stroke();
    pen.fillText(words, box.left - 9, down(level));
  }
  pen.textAlign = "center";
  pen.textBaseline = "top";
  for (const passes of [0, 1, 2, 5, 10, 20].filter((count) => count <= hero.passes)) {
    pen.fillText(String(passes), across(passes * hero.months), box.bottom + 8);
  }
  pen.textAlign = "right";
  pen.fillText(text("hero.passes"), box.right, box.bottom + 24);
}

// The loss stays as it is until the batch is full: curves are stairs.
function drawCurve(pen, run, isChosen, ink, across, down) {
  const frames = run.steps.length;
  const from = frames * rateIndex();
  const last = isChosen ? Math.max(0, Math.round(shownUpTo * (frames - 1))) : frames - 1;
  let level = run.levels[from] * hero.decades;
  pen.beginPath();
  pen.moveTo(across(0), down(level));
  for (let frame = 1; frame <= last; frame++) {
    const next = run.levels[from + frame] * hero.decades;
    if (Number.isNaN(next)) break;
    const x = across(run.steps[frame] * run.batch);
    if (run.steps[frame] - run.steps[frame - 1] === 1) pen.lineTo(x, down(level));
    pen.lineTo(x, down(next));
    level = next;
  }
  pen.strokeStyle = ink;
  pen.lineJoin = "round";
  pen.globalAlpha = isChosen ? 1 : 0.28;
  pen.lineWidth = (isChosen ? 1.3 : 1) + (frames < 60 ? 0.6 : 0);
  pen.stroke();
  pen.globalAlpha = 1;
}

// The median over the last pass, or above all if the run has overflowed.
function lastLevel(run) {
  const from = run.steps.length * rateIndex();
  const began = run.steps.at(-1) - hero.months / run.batch;
  const levels = run.steps.map((step, i) => (step > began ? run.levels[from + i] : NaN)).filter((level) => !Number.isNaN(level));
  if (!levels.length) return Infinity;
  return levels.sort((one, other) => one - other)[levels.length >> 1] * hero.decades;
}

function labelEnds(pen, ends, box, chosen, colour) {
  ends.sort((one, other) => one.y - other.y);
  for (let i = 1; i < ends.length; i++) ends[i].y = Math.max(ends[i].y, ends[i - 1].y + 16);
  for (let i = ends.length - 1, limit = box.bottom; i >= 0; i--, limit = ends[i + 1].y - 16) ends[i].y = Math.min(ends[i].y, limit);
  pen.textAlign = "left";
  pen.textBaseline = "middle";
  for (const { i, y } of ends) {
    pen.globalAlpha = i === chosen ? 1 : 0.62;
    pen.font = `${i === chosen ? "600 " : ""}12px ${colour("sans")}`;
    pen.fillStyle = colour(NAMES[i]);
    pen.fillText(text("hero.batch", { batch: hero.runs[i].batch }), box.right + 9, y);
  }
  pen.globalAlpha = 1;
}

function drawHero() {
  describe();
  drawFrame();
}

function drawFrame() {
  drawPath();
  drawLoss();
}

function play() {
  cancelAnimationFrame(moving);
  const began = performance.now();
  const move = (now) => {
    const share = Math.min(1, Math.max(0, (now - began) / MOVES));
    shownUpTo = share * share * (1.6 - 0.6 * share); // slowly at first, where the steps are large
    drawFrame(); // the sentence stays, so that it is read aloud once
    if (share < 1) moving = requestAnimationFrame(move);
  };
  moving = requestAnimationFrame(move);
}

function stopAt(change) {
  cancelAnimationFrame(moving);
  shownUpTo = 1;
  change();
  keep("lr", "batch");
  drawHero();
}

function startHero() {
  for (const i of hero.lrs.keys()) {
    const bar = document.createElement("i");
    bar.style.setProperty("--at", i / (hero.lrs.length - 1));
    element("bars").append(bar);
  }
  const [low, high] = [hero.lrs[0], hero.lrs.at(-1)].map(Number);
  const share = Math.log(hero.limit / low) / Math.log(high / low);
  element("limit").textContent = `2/L = ${hero.limit}`;
  element("limit").style.left = `calc(9px + ${share} * (100% - 18px))`;
  element("lr").addEventListener("input", (event) => stopAt(() => (state.lr = hero.lrs[event.target.value])));
  for (const input of document.querySelectorAll(".batches input")) {
    input.addEventListener("change", () => stopAt(() => (state.batch = Number(input.value))));
  }
  element("play").addEventListener("click", play);
  drawers.push(drawHero);
  drawHero();
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) play();
}

start();
startHero();
