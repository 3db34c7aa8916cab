// Runs the models beside the page, one request at a time; of requests that wait only the newest runs.
import * as ort from "./runtime.mjs";

let painter, detector, picture, kept, attention;
let waiting = null;
let busy = false;

/** The runtime's WebAssembly: stored compressed, unless a server has unpacked it already. */
async function readRuntime() {
  const response = await fetch("runtime.bin");
  if (!response.ok) throw new Error(`runtime.bin: ${response.status}`);
  const bytes = await response.arrayBuffer();
  const head = new Uint8Array(bytes, 0, 2);
  if (head[0] !== 0x1f || head[1] !== 0x8b) return bytes;
  const unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(unpacked).arrayBuffer();
}

async function open(file) {
  const response = await fetch(file);
  if (!response.ok) throw new Error(`${file}: ${response.status}`);
  const model = new Uint8Array(await response.arrayBuffer());
  return ort.InferenceSession.create(model, { executionProviders: ["wasm"] });
}

async function start({ autoencoder, file }) {
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmBinary = await readRuntime();
  painter = await open(autoencoder);
  postMessage({ kind: "progress", text: "The autoencoder is here; the detector comes next." });
  detector = await open(file);
}

const handlers = {
  start,
  async detector({ file }) {
    detector = await open(file);
  },
  async picture({ values, height, width }) {
    picture = new ort.Tensor("float32", values, [1, 3, height, width]);
  },
  async run({ id, keep, mean }) {
    const places = new ort.Tensor("int64", BigInt64Array.from(keep, BigInt), [keep.length]);
    const painted = await painter.run({ image: picture, keep: places });
    postMessage({ kind: "painted", id, values: painted.painted.data });
    const [height, width] = picture.dims.slice(2);
    const found = await detector.run({
      image: picture,
      keep: places,
      size: new ort.Tensor("int64", BigInt64Array.of(BigInt(height), BigInt(width)), [2]),
      mean_c4: new ort.Tensor("bool", [mean], []),
    });
    attention = found.attention;
    kept = keep;
    postMessage({
      kind: "found",
      id,
      boxes: found.boxes.data,
      labels: Array.from(found.labels.data, Number),
      scores: found.scores.data,
      masks: found.masks ? found.masks.data : null,
    });
  },
  /** A patch's attention in each block, mean over the heads: one row of K numbers a block. */
  async look({ id, place }) {
    const query = kept ? kept.indexOf(place) : -1;
    if (query < 0) return;
    const [blocks, heads, count] = attention.dims;
    const rows = Array.from({ length: blocks }, () => new Float32Array(count));
    for (let block = 0; block < blocks; block += 1)
      for (let head = 0; head < heads; head += 1) {
        const first = ((block * heads + head) * count + query) * count;
        for (let key = 0; key < count; key += 1)
          rows[block][key] += attention.data[first + key] / heads;
      }
    postMessage({ kind: "looked", id, place, keep: kept, rows });
  },
};

async function work(request) {
  try {
    await handlers[request.kind](request);
    postMessage({ kind: "done", of: request.kind });
  } catch (error) {
    postMessage({ kind: "failed", of: request.kind, text: String(error.message ?? error) });
  }
}

const queue = [];
async function drain() {
  busy = true;
  while (queue.length || waiting) {
    // Everything but runs is done in order; a run that a newer one has replaced is never begun.
    const next = queue.length ? queue.shift() : waiting;
    if (next === waiting) waiting = null;
    await work(next);
  }
  busy = false;
}

addEventListener("message", ({ data }) => {
  if (data.kind === "run") waiting = data;
  else {
    if (data.kind === "picture" || data.kind === "detector") waiting = null; // of the one before
    queue.push(data);
  }
  if (!busy) drain();
});
