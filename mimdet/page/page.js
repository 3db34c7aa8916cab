// The page: what is chosen, what the worker answered, and the controls. Drawing is in pictures.js.
import * as draw from "./pictures.js";
import { overlap, sampled } from "./tokens.js";

const $ = (id) => document.getElementById(id);
const OBJECT = 0.5; // IoU from which a detection is that of an object
const state = {
  content: null, // models.json
  detector: 0,
  scene: 0, // a place among the scenes, "stranger", or "photo"
  first: 0, // of the scenes that are shown
  picture: null, // a canvas of the picture
  grey: null, // the same for attention to be drawn on
  kept: [], // a boolean a token
  ratio: 100,
  seed: 1,
  cursor: null,
  looks: null, // the place of the patch that looks
  found: [], // every detection, best first
  painted: null,
  asked: 0, // number of the newest request
  answered: 0,
  fresh: 0, // number of the first request of this picture
  times: new Map(), // number of a request -> when it was made
  milliseconds: null,
};
const worker = new Worker("worker.js", { type: "module" });
let ready = false;

const abouts = (entry) => ({ mean: JSON.parse(entry.about.mean), std: JSON.parse(entry.about.std) });
const names = () => JSON.parse(current().about.classes).map((one) => one.name);
const current = () => state.content.detectors[state.detector];
const columns = () => state.picture.width / draw.PATCH;
const rows = () => state.picture.height / draw.PATCH;
const places = () => state.kept.flatMap((seen, place) => (seen ? [place] : []));
const objects = () => state.content.scenes[state.scene]?.objects ?? [];
const sure = () => state.found.filter((one) => one.score >= Number($("score").value) / 100);

// ------------------------------------------------------------------ asking and answering

function ask() {
  if (!state.picture || !ready) return;
  state.asked += 1;
  state.times.set(state.asked, performance.now());
  worker.postMessage({ kind: "run", id: state.asked, keep: places(), mean: $("without").checked });
}

function change() {
  showTokens();
  showPainted(); // what is seen is pasted at once; the rest follows
  ask();
}

const answers = {
  progress: ({ text }) => say(text),
  done({ of }) {
    if (of !== "start") return;
    ready = true;
    $("detector").disabled = false;
    sendPicture();
  },
  failed({ of, text }) {
    say(`${of === "start" ? "The models could not be loaded" : "That failed"}: ${text}`);
  },
  painted({ id, values }) {
    if (id < state.fresh) return; // of the picture before
    state.painted = values;
    showPainted();
  },
  found({ id, boxes, labels, scores, masks }) {
    if (id < state.fresh) return;
    const cells = masks ? masks.length / labels.length : 0;
    state.found = labels.map((label, i) => ({
      label,
      score: scores[i],
      box: Array.from(boxes.slice(4 * i, 4 * i + 4)),
      mask: masks ? masks.slice(cells * i, cells * (i + 1)) : null,
    }));
    state.answered = id;
    showFound();
    state.milliseconds = Math.round(performance.now() - state.times.get(id));
    for (const one of state.times.keys()) if (one <= id) state.times.delete(one);
    look();
    report();
  },
  looked: showAttention,
};
worker.addEventListener("message", ({ data }) => answers[data.kind](data));
worker.addEventListener("error", (event) => say(`The page cannot run its models: ${event.message}`));

function say(text) {
  $("status").textContent = text;
}

function report() {
  const [kept, all] = [places().length, state.kept.length];
  const truth = objects();
  const found = sure().length;
  const finds = truth.length
    ? `${truth.length - missed().length} of ${truth.length} objects`
    : `${found} ${found === 1 ? "detection" : "detections"}`;
  say(`${kept} of ${all} tokens · ${finds} · ${state.milliseconds} ms`);
}

// ------------------------------------------------------------------ what is seen

function showTokens() {
  const focused = document.activeElement === $("tokens");
  draw.drawTokens($("tokens"), state.picture, state.kept, {
    cursor: focused ? state.cursor : null,
    looks: state.looks,
  });
  const share = (100 * places().length) / state.kept.length;
  $("percent").textContent = `${share < 1 ? "<1" : Math.round(share)} %`;
  $("tokens").setAttribute(
    "aria-label",
    `Tokens of the picture, ${rows()} rows of ${columns()}: ${places().length} kept. ` + where(),
  );
}

function where() {
  if (state.cursor === null) return "";
  const [row, column] = [Math.floor(state.cursor / columns()), state.cursor % columns()];
  return `Row ${row + 1}, column ${column + 1}: ${state.kept[state.cursor] ? "kept" : "hidden"}.`;
}

function showPainted() {
  if (!state.painted || state.painted.length !== 3 * state.picture.width * state.picture.height) return;
  const canvas = $("painted");
  draw.drawValues(canvas, state.picture, state.painted, abouts(state.content.autoencoder));
  if ($("pasted").checked) {
    const [context, side] = [canvas.getContext("2d"), draw.PATCH];
    for (const place of places()) {
      const [x, y] = [(place % columns()) * side, Math.floor(place / columns()) * side];
      const big = [x, y, side, side].map((edge) => edge * draw.SCALE);
      context.drawImage(state.picture, x, y, side, side, ...big);
    }
  }
  const hidden = state.kept.length - places().length;
  canvas.setAttribute("aria-label", `The picture with ${hidden} hidden patches painted in`);
}

/** Objects that no detection has found; a detection, best first, finds one. */
function missed() {
  const open = new Set(objects());
  for (const one of sure()) {
    const fits = [...open].filter((o) => o.label === one.label && overlap(o.box, one.box) >= OBJECT);
    fits.sort((a, b) => overlap(b.box, one.box) - overlap(a.box, one.box));
    if (fits.length) open.delete(fits[0]);
  }
  return [...open];
}

function showFound() {
  const [shown, gone] = [sure(), missed()];
  draw.drawFound($("found"), state.picture, shown, names(), gone);
  const told = shown.map((one) => `${names()[one.label]} ${one.score.toFixed(2)}`).join(", ");
  $("found").setAttribute("aria-label", `Found: ${told || "nothing"}`);
  const items = objects().length
    ? objects().map((one) => [`${one.size} ${one.name}`, gone.includes(one) ? "missed" : "hit"])
    : shown.map((one) => [`${names()[one.label]} ${one.score.toFixed(2)}`, "said"]);
  $("objects").replaceChildren(
    ...items.map(([text, kind]) => {
      const item = document.createElement("li");
      item.className = kind;
      item.textContent = { hit: "✓ ", missed: "✗ ", said: "" }[kind] + text;
      if (kind === "missed") item.setAttribute("aria-label", `${text}: missed`);
      return item;
    }),
  );
}

/** Ask where the chosen patch looks, or the kept one nearest to it. */
function look() {
  if (state.looks === null) state.looks = centreOfObject();
  const kept = places();
  const away = (place) =>
    (Math.floor(place / columns()) - Math.floor(state.looks / columns())) ** 2 +
    ((place % columns()) - (state.looks % columns())) ** 2;
  const nearest = kept.reduce((best, place) => (away(place) < away(best) ? place : best), kept[0]);
  worker.postMessage({ kind: "look", id: state.asked, place: nearest });
}

function centreOfObject() {
  const largest = [...objects()].sort((a, b) => (b.box[2] - b.box[0]) - (a.box[2] - a.box[0]))[0];
  const box = largest?.box ?? [0, 0, state.picture.width, state.picture.height];
  const place = (low, high, most) => Math.min(most - 1, Math.floor((low + high) / 2 / draw.PATCH));
  return place(box[1], box[3], rows()) * columns() + place(box[0], box[2], columns());
}

function showAttention({ place, keep, rows: maps }) {
  const box = $("blocks");
  if (keep.some((at) => at >= state.kept.length)) return; // of another picture
  const [row, column] = [Math.floor(place / columns()), place % columns()];
  while (box.children.length > maps.length) box.lastChild.remove();
  while (box.children.length < maps.length) {
    const figure = document.createElement("figure");
    const canvas = figure.appendChild(document.createElement("canvas"));
    canvas.setAttribute("role", "img");
    canvas.addEventListener("click", (event) => lookFrom(placeOf(event, canvas)));
    figure.append(document.createElement("figcaption"));
    box.append(figure);
  }
  maps.forEach((map, block) => {
    const [canvas, caption] = box.children[block].children;
    draw.drawAttention(canvas, state.grey, keep, map, place);
    const distance = keep.reduce(
      (sum, at, i) =>
        sum + map[i] * Math.hypot(Math.floor(at / columns()) - row, (at % columns()) - column),
      0,
    );
    const text = `Block ${block + 1}: ${distance.toFixed(1)} patches away`;
    caption.textContent = text;
    canvas.setAttribute("aria-label", `${text} on average`);
  });
  const instead = state.looks === place ? "" : " (the one you chose is hidden; the nearest kept one)";
  $("looks").textContent =
    `From row ${row + 1}, column ${column + 1}${instead}. Bright: much of its attention, mean over ` +
    "the heads. Click a picture to look from elsewhere.";
}

// ------------------------------------------------------------------ choosing tokens

function sample() {
  state.kept = sampled($("sampler").value, rows(), columns(), state.ratio / 100, state.seed);
  change();
}

function brush(place, wide) {
  const seen = tool() === "show";
  const [row, column] = [Math.floor(place / columns()), place % columns()];
  const reach = wide ? 1 : 0;
  for (let r = Math.max(0, row - reach); r <= Math.min(rows() - 1, row + reach); r += 1)
    for (let c = Math.max(0, column - reach); c <= Math.min(columns() - 1, column + reach); c += 1)
      state.kept[r * columns() + c] = seen;
  if (!state.kept.includes(true)) state.kept[place] = true; // an encoder needs something to see
  change();
}

const tool = () => document.querySelector("input[name=tool]:checked").value;

function lookFrom(place) {
  state.looks = place;
  showTokens();
  look();
}

function placeOf(event, canvas) {
  const area = canvas.getBoundingClientRect();
  const step = (at, size, most) => Math.max(0, Math.min(most - 1, Math.floor((at / size) * most)));
  const row = step(event.clientY - area.top, area.height, rows());
  return row * columns() + step(event.clientX - area.left, area.width, columns());
}

let brushing = null;
$("tokens").addEventListener("pointerdown", (event) => {
  if (!state.picture || event.button !== 0) return;
  state.cursor = placeOf(event, $("tokens"));
  if (tool() === "look") return lookFrom(state.cursor);
  $("tokens").setPointerCapture(event.pointerId);
  brushing = state.cursor;
  brush(brushing, $("wide").checked);
});
$("tokens").addEventListener("pointermove", (event) => {
  if (brushing === null) return;
  const place = placeOf(event, $("tokens"));
  if (place === brushing) return;
  brushing = state.cursor = place;
  brush(place, $("wide").checked);
});
for (const end of ["pointerup", "pointercancel"])
  $("tokens").addEventListener(end, () => (brushing = null));
$("tokens").addEventListener("focus", () => {
  state.cursor ??= 0;
  if (state.picture) showTokens();
});
$("tokens").addEventListener("blur", () => state.picture && showTokens());
$("tokens").addEventListener("keydown", (event) => {
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  if (!state.picture) return;
  if (event.key in moves) {
    const [down, right] = moves[event.key];
    const row = Math.max(0, Math.min(rows() - 1, Math.floor(state.cursor / columns()) + down));
    const column = Math.max(0, Math.min(columns() - 1, (state.cursor % columns()) + right));
    state.cursor = row * columns() + column;
    if (event.shiftKey && tool() !== "look") brush(state.cursor, $("wide").checked);
    else showTokens();
  } else if (event.key === " ") {
    if (state.kept[state.cursor] && places().length === 1) return event.preventDefault();
    state.kept[state.cursor] = !state.kept[state.cursor];
    change();
  } else if (event.key === "Enter") lookFrom(state.cursor);
  else return;
  event.preventDefault();
});
for (const id of ["painted", "found"])
  $(id).addEventListener("click", (event) => state.picture && lookFrom(placeOf(event, $(id))));

// ------------------------------------------------------------------ controls

$("ratio").addEventListener("input", () => {
  state.ratio = Number($("ratio").value);
  sample();
});
$("sampler").addEventListener("change", sample);
$("again").addEventListener("click", () => {
  state.seed += 1;
  if (state.ratio >= 100) setRatio(25);
  sample();
});
$("all").addEventListener("click", () => {
  setRatio(100);
  sample();
});
$("without").addEventListener("change", ask);
$("pasted").addEventListener("change", showPainted);
$("score").addEventListener("input", () => {
  $("from").textContent = (Number($("score").value) / 100).toFixed(2);
  if (state.answered) [showFound, report].forEach((show) => show());
});
$("detector").addEventListener("change", () => {
  state.detector = Number($("detector").value);
  worker.postMessage({ kind: "detector", file: current().file });
  tellAbout();
  ask();
});
$("more").addEventListener("click", () => {
  state.first = (state.first + state.content.first) % state.content.scenes.length;
  showStrip();
  choose(state.first);
});

/** The shown scene with most large objects, or with most of the rarer of small and large ones. */
function richest(kind) {
  const worth = state.content.scenes.slice(0, state.content.first).map((scene) => {
    const [small, large] = ["small", "large"].map(
      (size) => scene.objects.filter((one) => one.size === size).length,
    );
    return kind === "large" ? large : Math.min(small, large);
  });
  return worth.indexOf(Math.max(...worth));
}

function setRatio(ratio) {
  state.ratio = ratio;
  $("ratio").value = ratio;
}

for (const button of document.querySelectorAll("[data-set]"))
  button.addEventListener("click", async () => {
    const wanted = JSON.parse(button.dataset.set);
    $("sampler").value = wanted.sampler ?? "random";
    $("without").checked = wanted.without ?? false;
    if (wanted.look) document.querySelector("input[name=tool][value=look]").checked = true;
    setRatio(wanted.ratio);
    await choose(wanted.scene === "stranger" ? wanted.scene : richest(wanted.scene));
    $("tokens").scrollIntoView({ block: "nearest", behavior: "smooth" });
  });

// ------------------------------------------------------------------ pictures

function showStrip() {
  const { scenes, first } = state.content;
  const shown = scenes.slice(state.first, state.first + first).map((scene, i) => state.first + i);
  $("scenes").replaceChildren(
    ...[...shown, "stranger"].map((scene) => {
      const label = document.createElement("label");
      const radio = label.appendChild(document.createElement("input"));
      Object.assign(radio, { type: "radio", name: "scene", value: scene, checked: scene === state.scene });
      radio.addEventListener("change", () => choose(scene));
      const image = label.appendChild(document.createElement("img"));
      Object.assign(image, { src: fileOf(scene), width: 56, height: 56, alt: describe(scene) });
      return label;
    }),
  );
}

const fileOf = (scene) => (scene === "stranger" ? "stranger.png" : state.content.scenes[scene].file);

function describe(scene) {
  if (scene === "stranger") return "A drawn house, which the detector has never seen";
  const told = state.content.scenes[scene].objects.map((one) => `${one.size} ${one.name}`);
  return `Picture ${scene + 1}: ${told.join(", ") || "no objects"}`;
}

async function choose(wanted) {
  const scene = wanted in state.content.scenes ? wanted : "stranger";
  const response = await fetch(fileOf(scene));
  const image = await createImageBitmap(await response.blob());
  if (scene !== "stranger" && (scene < state.first || scene >= state.first + state.content.first)) {
    state.first = 0;
    showStrip();
  }
  state.scene = scene;
  for (const radio of document.querySelectorAll("input[name=scene]"))
    radio.checked = radio.value === String(scene);
  usePicture(image, image.width, image.height);
}

/** Put an image on the page, width x height of it from its middle. */
function usePicture(image, width, height) {
  const scale = Math.max(width / image.width, height / image.height);
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  const [wide, high] = [image.width * scale, image.height * scale];
  context.fillStyle = "#ffffff"; // behind what is transparent
  context.fillRect(0, 0, width, height);
  context.drawImage(image, (width - wide) / 2, (height - high) / 2, wide, high);
  state.picture = canvas;
  state.grey = draw.darkened(canvas);
  state.painted = null;
  state.looks = state.cursor = null;
  state.kept = Array(rows() * columns()).fill(true);
  sendPicture();
}

function sendPicture() {
  if (!ready || !state.picture) return;
  const { width, height } = state.picture;
  const pixels = state.picture.getContext("2d").getImageData(0, 0, width, height).data;
  const { mean, std } = abouts(current());
  const values = new Float32Array(3 * width * height);
  for (let i = 0; i < width * height; i += 1)
    for (let c = 0; c < 3; c += 1)
      values[c * width * height + i] = (pixels[4 * i + c] - mean[c]) / std[c];
  state.fresh = state.asked + 1;
  worker.postMessage({ kind: "picture", values, width, height }, [values.buffer]);
  sample();
}

async function usePhoto(file) {
  let image;
  try {
    image = await createImageBitmap(file);
  } catch {
    return say(`${file.name} is not a picture that this browser reads: try a JPEG or PNG file.`);
  }
  const short = Math.floor(Number(current().about.short_side) / 32) * 32;
  const long = Math.max(image.width, image.height) / Math.min(image.width, image.height);
  const side = Math.max(short, Math.floor((short * Math.min(long, 1.5)) / 32) * 32);
  state.scene = "photo";
  for (const radio of document.querySelectorAll("input[name=scene]")) radio.checked = false;
  if (image.width >= image.height) usePicture(image, side, short);
  else usePicture(image, short, side);
}

$("photo").addEventListener("change", () => {
  if ($("photo").files.length) usePhoto($("photo").files[0]);
  $("photo").value = "";
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  $("drop").hidden = false;
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) $("drop").hidden = true;
});
addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").hidden = true;
  if (event.dataTransfer.files.length) usePhoto(event.dataTransfer.files[0]);
});

// ------------------------------------------------------------------ start

function tellAbout() {
  const { name, about } = current();
  $("about").textContent =
    `Detector ${name} (preset ${about.preset}, ${JSON.parse(about.classes).length} classes, weights ` +
    `sha256 ${about.weights_sha256.slice(0, 12)}, licence: ${about.licence}), made with mimdet ` +
    `${about.mimdet}; run by ${state.content.runtime}, MIT licence, in this page alone.`;
}

async function begin() {
  const response = await fetch("models.json");
  if (!response.ok) throw new Error(`models.json: ${response.status}`);
  state.content = await response.json();
  state.content.detectors.forEach(({ name }, i) => $("detector").add(new Option(name, i)));
  for (const span of document.querySelectorAll("[data-number]"))
    span.textContent = state.content.lesson[span.dataset.number] ?? "-";
  tellAbout();
  worker.postMessage({ kind: "start", autoencoder: state.content.autoencoder.file, file: current().file });
  showStrip();
  await choose(0);
  if (!ready) say("Loading the models, some megabytes, once …");
}
begin().catch((error) => say(`The page could not be loaded: ${error.message}`));

/** For tests and the curious: what is on the page. */
window.playground = {
  state,
  tokens: places,
  settled: () => ready && state.asked > 0 && state.answered === state.asked,
};
