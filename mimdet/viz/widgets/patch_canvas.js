// A picture under a grid of tokens: click one, brush some away, move with the arrow keys.
// Python side: canvas.py. Python bumps `seq` after it has answered; `data-seq` follows once the
// answer is on the screen, which is what tests wait for.
const STATE = "dropped selected rows columns size seq show_grid tool title label".split(" ");

function render({ model, el }) {
  const canvas = document.createElement("canvas");
  canvas.className = "mimdet-canvas";
  el.classList.add("mimdet-box");
  canvas.tabIndex = 0;
  const title = document.createElement("div");
  title.className = "mimdet-title";
  el.append(title, canvas);
  const pen = canvas.getContext("2d");
  let shown = null; // the old picture stays until the new one is decoded
  let loading = false;
  let brushing = false;
  let dropping = true;
  let lost = false; // the kernel has ended, or is out of reach
  let last = -1; // place of the stroke's last event

  const rows = () => model.get("rows");
  const columns = () => model.get("columns");
  const looking = () => model.get("tool") === "look";

  // ------------------------------------------------------------------------------- drawing

  function square(place) {
    const w = canvas.width / columns();
    const h = canvas.height / rows();
    return [(place % columns()) * w, Math.floor(place / columns()) * h, w, h];
  }

  function draw() {
    const [width, height] = model.get("size");
    el.style.setProperty("--width", `${width}px`);
    canvas.width = width;
    canvas.height = height;
    if (shown) pen.drawImage(shown, 0, 0, width, height);
    pen.fillStyle = "rgba(225, 225, 225, 0.88)";
    for (const place of model.get("dropped")) pen.fillRect(...square(place));
    if (model.get("show_grid")) drawGrid(width, height);
    if (model.get("selected") >= 0) {
      for (const [line, colour] of [[5, "#ffffff"], [3, "#D55E00"]]) {
        pen.lineWidth = line;
        pen.strokeStyle = colour;
        pen.strokeRect(...square(model.get("selected")));
      }
    }
    describe();
  }

  function drawGrid(width, height) {
    pen.strokeStyle = "rgba(255, 255, 255, 0.45)";
    pen.lineWidth = 1;
    pen.beginPath();
    for (let i = 1; i < columns(); i++) {
      pen.moveTo((i * width) / columns(), 0);
      pen.lineTo((i * width) / columns(), height);
    }
    for (let i = 1; i < rows(); i++) {
      pen.moveTo(0, (i * height) / rows());
      pen.lineTo(width, (i * height) / rows());
    }
    pen.stroke();
  }

  function answered() {
    lost = false;
    draw();
  }

  function disconnected() {
    lost = true;
    draw();
  }

  function describe() {
    const chosen = model.get("selected");
    const where = `: row ${Math.floor(chosen / columns())}, column ${chosen % columns()}`;
    title.textContent = model.get("title");
    if (brushing) title.textContent = dropping ? "this stroke drops tokens" : "this stroke brings tokens back";
    if (lost) title.textContent = "no kernel answers: run the cells above and this one again";
    canvas.style.cursor = looking() ? "default" : "crosshair";
    canvas.style.touchAction = looking() ? "auto" : "none"; // a finger scrolls, or draws
    canvas.setAttribute("role", looking() ? "img" : "application");
    canvas.setAttribute("aria-label", model.get("label") + (chosen < 0 ? "" : where));
    canvas.dataset.selected = chosen;
    canvas.dataset.dropped = model.get("dropped").length;
    if (!loading) canvas.dataset.seq = model.get("seq");
  }

  // Decoding takes a moment; when pictures come faster than that, only the newest one counts.
  function load() {
    const url = model.get("picture");
    const image = new Image();
    loading = true;
    const done = (loaded) => {
      if (model.get("picture") !== url) return;
      shown = loaded;
      loading = false;
      draw();
    };
    if (!url) return done(null);
    image.onload = () => done(image);
    image.onerror = () => done(null);
    image.src = url;
  }

  // ------------------------------------------------------------------------------- pointer

  function placeUnder(event) {
    const column = Math.floor((event.offsetX / canvas.clientWidth) * columns());
    const row = Math.floor((event.offsetY / canvas.clientHeight) * rows());
    const outside = column < 0 || row < 0 || column >= columns() || row >= rows();
    return outside ? -1 : row * columns() + column;
  }

  // Tokens on the way from one event to the next: a fast pointer reports few places.
  function between(from, to) {
    const [y0, x0] = [Math.floor(from / columns()), from % columns()];
    const [dy, dx] = [Math.floor(to / columns()) - y0, (to % columns()) - x0];
    const steps = Math.max(1, Math.abs(dy), Math.abs(dx));
    const at = (i) => Math.round(y0 + (dy * i) / steps) * columns() + Math.round(x0 + (dx * i) / steps);
    return Array.from({ length: steps + 1 }, (_, i) => at(i));
  }

  function brush(places) {
    const dropped = new Set(model.get("dropped"));
    for (const place of places) dropping ? dropped.add(place) : dropped.delete(place);
    model.set("dropped", [...dropped].sort((a, b) => a - b));
    draw();
  }

  function select(place) {
    model.set("selected", place);
    model.save_changes();
    draw();
  }

  function finishStroke() {
    if (!brushing) return;
    brushing = false;
    draw();
    model.save_changes(); // one message a stroke
  }

  canvas.addEventListener("pointerdown", (event) => {
    const place = placeUnder(event);
    if (place < 0 || looking() || event.button !== 0) return;
    if (model.get("tool") === "select") return select(place);
    canvas.setPointerCapture(event.pointerId);
    brushing = true;
    dropping = !model.get("dropped").includes(place);
    last = place;
    brush([place]);
  });
  canvas.addEventListener("pointermove", (event) => {
    const place = placeUnder(event);
    if (!brushing || place === last) return;
    if (place >= 0) brush(last < 0 ? [place] : between(last, place));
    last = place;
  });
  canvas.addEventListener("pointerleave", () => (last = -1));
  window.addEventListener("pointerup", finishStroke); // a stroke may end outside
  window.addEventListener("pointercancel", finishStroke);

  // ------------------------------------------------------------------------------- keyboard

  const MOVES = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

  canvas.addEventListener("keydown", (event) => {
    const act = event.key === "Enter" || event.key === " ";
    const held = event.ctrlKey || event.metaKey || event.altKey || event.shiftKey;
    if (looking() || held || !(act || event.key in MOVES)) return;
    event.preventDefault();
    event.stopPropagation(); // the notebook has plans for these keys too
    const now = model.get("selected");
    if (act) {
      if (model.get("tool") !== "brush" || now < 0) return;
      dropping = !model.get("dropped").includes(now);
      brush([now]);
      return model.save_changes();
    }
    if (now < 0) return select(0);
    const row = Math.floor(now / columns()) + MOVES[event.key][0];
    const column = (now % columns()) + MOVES[event.key][1];
    if (row < 0 || column < 0 || row >= rows() || column >= columns()) return;
    select(row * columns() + column);
  });

  const listeners = STATE.map((name) => [`change:${name}`, name === "seq" ? answered : draw]);
  listeners.push(["change:picture", load], ["comm_live_update", disconnected]);
  for (const [event, listener] of listeners) model.on(event, listener);
  load();
  return () => {
    for (const [event, listener] of listeners) model.off(event, listener);
    window.removeEventListener("pointerup", finishStroke);
    window.removeEventListener("pointercancel", finishStroke);
  };
}
export default { render };
