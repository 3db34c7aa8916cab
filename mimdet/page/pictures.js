// Everything that is drawn: tokens, paintings, detections, attention. No state.

export const SCALE = 2; // canvas pixels of a picture's pixel
export const PATCH = 16;
// Okabe and Ito: told apart with any kind of colour vision.
const COLOURS = ["#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"];

export function colourOf(label) {
  return COLOURS[label % COLOURS.length];
}

function rgb(colour) {
  return [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
}

function prepare(canvas, picture, scale = SCALE) {
  const [width, height] = [picture.width * scale, picture.height * scale];
  if (canvas.width !== width || canvas.height !== height) {
    canvas.width = width;
    canvas.height = height;
  }
  // In memory, not on a graphics card: masks are mixed with the pixels under them.
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.globalAlpha = 1;
  context.imageSmoothingEnabled = false;
  return context;
}

/** The picture with hidden tokens hatched, the cursor of the keyboard and the patch that looks. */
export function drawTokens(canvas, picture, kept, { cursor, looks }) {
  const context = prepare(canvas, picture);
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  const [side, columns] = [PATCH * SCALE, picture.width / PATCH];
  kept.forEach((seen, place) => {
    const [x, y] = [(place % columns) * side, Math.floor(place / columns) * side];
    if (!seen) {
      context.fillStyle = "#4a4f57";
      context.fillRect(x, y, side, side);
      context.strokeStyle = "#626873";
      context.lineWidth = 2;
      context.beginPath();
      context.moveTo(x + 6, y + side - 6);
      context.lineTo(x + side - 6, y + 6);
      context.stroke();
    }
    context.strokeStyle = seen ? "rgb(255 255 255 / 25%)" : "#3a3e45";
    context.lineWidth = 1;
    context.strokeRect(x + 0.5, y + 0.5, side - 1, side - 1);
  });
  if (looks !== null) frame(context, looks, columns, "#ffffff", "#d55e00");
  if (cursor !== null) frame(context, cursor, columns, "#000000", "#56b4e9");
}

function frame(context, place, columns, outer, inner) {
  const side = PATCH * SCALE;
  const [x, y] = [(place % columns) * side, Math.floor(place / columns) * side];
  for (const [colour, width] of [[outer, 8], [inner, 4]]) {
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.strokeRect(x + 2, y + 2, side - 4, side - 4);
  }
}

/** Normalised values (3, H, W) as a picture. */
export function drawValues(canvas, picture, values, about) {
  const context = prepare(canvas, picture);
  const image = new ImageData(picture.width, picture.height);
  const count = picture.width * picture.height;
  for (let i = 0; i < count; i += 1) {
    for (let c = 0; c < 3; c += 1)
      image.data[4 * i + c] = values[c * count + i] * about.std[c] + about.mean[c];
    image.data[4 * i + 3] = 255;
  }
  const small = new OffscreenCanvas(picture.width, picture.height);
  small.getContext("2d").putImageData(image, 0, 0);
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
}

/** Detections on the picture: masks, boxes, names; dashed: objects that nothing has found. */
export function drawFound(canvas, picture, found, names, missed) {
  const context = prepare(canvas, picture);
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  for (const one of [...found].reverse())
    if (one.mask) drawMask(context, one);
  context.font = "600 18px system-ui, sans-serif";
  context.textBaseline = "middle";
  for (const one of [...found].reverse()) {
    const [x0, y0, x1, y1] = one.box.map((side) => side * SCALE);
    context.setLineDash([]);
    context.strokeStyle = colourOf(one.label);
    context.lineWidth = 3;
    context.strokeRect(x0, y0, x1 - x0, y1 - y0);
    const text = `${names[one.label]} ${one.score.toFixed(2)}`;
    const wide = context.measureText(text).width + 8;
    const left = Math.max(0, Math.min(x0, canvas.width - wide));
    const top = y0 >= 22 ? y0 - 22 : Math.min(y0, canvas.height - 22);
    context.fillStyle = "rgb(0 0 0 / 72%)";
    context.fillRect(left, top, wide, 22);
    context.fillStyle = "#ffffff";
    context.fillText(text, left + 4, top + 11);
  }
  context.setLineDash([8, 6]);
  for (const one of missed) {
    const [x0, y0, x1, y1] = one.box.map((side) => side * SCALE);
    context.strokeStyle = "#ffffff";
    context.lineWidth = 3;
    context.strokeRect(x0, y0, x1 - x0, y1 - y0);
  }
  context.setLineDash([]);
}

/** 28 x 28 probabilities over a box, read between their centres; outside they count as 0. */
function drawMask(context, { box, mask, label }) {
  const side = Math.round(Math.sqrt(mask.length));
  const [x0, y0, x1, y1] = box.map((edge) => edge * SCALE);
  const [left, top] = [Math.max(0, Math.floor(x0)), Math.max(0, Math.floor(y0))];
  const right = Math.min(context.canvas.width, Math.ceil(x1));
  const bottom = Math.min(context.canvas.height, Math.ceil(y1));
  if (right <= left || bottom <= top) return;
  const image = context.getImageData(left, top, right - left, bottom - top);
  const colour = rgb(colourOf(label));
  const cell = (row, column) =>
    row < 0 || column < 0 || row >= side || column >= side ? 0 : mask[row * side + column];
  for (let y = top; y < bottom; y += 1) {
    const v = ((y + 0.5 - y0) / (y1 - y0)) * side - 0.5;
    const row = Math.floor(v);
    for (let x = left; x < right; x += 1) {
      const u = ((x + 0.5 - x0) / (x1 - x0)) * side - 0.5;
      const column = Math.floor(u);
      const [across, down] = [u - column, v - row];
      const upper = cell(row, column) * (1 - across) + cell(row, column + 1) * across;
      const lower = cell(row + 1, column) * (1 - across) + cell(row + 1, column + 1) * across;
      if (upper * (1 - down) + lower * down < 0.5) continue;
      const at = 4 * ((y - top) * (right - left) + x - left);
      for (let c = 0; c < 3; c += 1) image.data[at + c] = 0.5 * image.data[at + c] + 0.5 * colour[c];
    }
  }
  context.putImageData(image, left, top);
}

/** A picture, dark and without colours: what attention is drawn on. */
export function darkened(picture) {
  const grey = new OffscreenCanvas(picture.width, picture.height);
  const context = grey.getContext("2d");
  context.filter = "grayscale(1) brightness(0.45)";
  context.drawImage(picture, 0, 0);
  return grey;
}

/** One block: how much of its attention a patch gives to each kept token; bright is much. */
export function drawAttention(canvas, grey, keep, row, place) {
  const context = prepare(canvas, grey, 1);
  context.drawImage(grey, 0, 0);
  const columns = grey.width / PATCH;
  const most = Math.max(...row);
  context.fillStyle = "#f0a020";
  keep.forEach((at, i) => {
    context.globalAlpha = 0.95 * Math.sqrt(row[i] / most);
    context.fillRect((at % columns) * PATCH, Math.floor(at / columns) * PATCH, PATCH, PATCH);
  });
  context.globalAlpha = 1;
  const [x, y] = [(place % columns) * PATCH, Math.floor(place / columns) * PATCH];
  for (const [colour, width] of [["#ffffff", 5], ["#d55e00", 3]]) {
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.strokeRect(x + 1, y + 1, PATCH - 2, PATCH - 2);
  }
}
