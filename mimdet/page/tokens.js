// Which tokens are kept, as `mimdet.models.sampling` draws them; and how far two boxes are the same.

/** Numbers in 0..1 from a seed (mulberry32). */
function numbers(seed) {
  let a = seed;
  return () => {
    a = (a + 0x6d2b79f5) | 0;
    let t = Math.imul(a ^ (a >>> 15), 1 | a);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

/** A score for every token, row by row; the highest are kept. */
const samplers = {
  random: (next) => () => next(),
  /** Evenly spread at any ratio: the order of an ordered-dither matrix, shifted at random. */
  grid(next, rows, columns) {
    const shift = [Math.floor(next() * 65536), Math.floor(next() * 65536)];
    const bits = Math.ceil(Math.log2(Math.max(rows, columns, 2)));
    return (row, column) => {
      let rank = 0;
      for (let bit = 0; bit < bits; bit += 1) {
        const [r, c] = [((row + shift[0]) >> bit) & 1, ((column + shift[1]) >> bit) & 1];
        rank = rank * 4 + 2 * (r ^ c) + r; // low bits decide first
      }
      return -rank;
    };
  },
  /** Squares of 4 x 4 tokens are kept or dropped together. */
  block(next) {
    const squares = new Map();
    return (row, column) => {
      const square = `${Math.floor(row / 4)},${Math.floor(column / 4)}`;
      if (!squares.has(square)) squares.set(square, next());
      return squares.get(square);
    };
  },
};

/** A boolean a token: the share `ratio` of them is kept, at least one. */
export function sampled(sampler, rows, columns, ratio, seed) {
  const scoreOf = samplers[sampler](numbers(seed), rows, columns);
  const scores = Array.from({ length: rows * columns }, (_, place) =>
    scoreOf(Math.floor(place / columns), place % columns),
  );
  const order = scores.map((_, place) => place).sort((a, b) => scores[b] - scores[a] || a - b);
  const count = Math.max(1, Math.floor(ratio * scores.length));
  const best = new Set(order.slice(0, count));
  return scores.map((_, place) => best.has(place));
}

/** Intersection over union of two boxes. */
export function overlap(a, b) {
  const wide = Math.max(0, Math.min(a[2], b[2]) - Math.max(a[0], b[0]));
  const high = Math.max(0, Math.min(a[3], b[3]) - Math.max(a[1], b[1]));
  const area = (box) => (box[2] - box[0]) * (box[3] - box[1]);
  return (wide * high) / (area(a) + area(b) - wide * high);
}
