// Figures of more cells than a document should have: painted, read out by pointer and arrow keys.

const SHADES = 64;
const waiting = []; // painted once their figure is in the page and has a width

/** Paint what `replaceChildren` just put into the page. */
function paintWaiting() {
  for (const surface of waiting.splice(0)) surface.repaint();
}

/** The page's colors as they are now: a scheme may change, a print is light. */
function palette() {
  const style = getComputedStyle(document.documentElement);
  const names = [
    "card",
    "ink",
    "soft",
    "line",
    "accent",
    "bar",
    "neutral",
    "wrong",
    "heat-low",
    "heat-high",
    "on-high",
  ];
  return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

/** [red, green, blue] of `SHADES` steps from one color to another. */
function shades(from, to) {
  const brush = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  brush.canvas.width = SHADES;
  brush.canvas.height = 1;
  for (let index = 0; index < SHADES; index++) {
    brush.fillStyle = `color-mix(in oklab, ${to} ${(100 * index) / (SHADES - 1)}%, ${from})`;
    brush.fillRect(index, 0, 1, 1);
  }
  const data = brush.getImageData(0, 0, SHADES, 1).data;
  return Array.from({ length: SHADES }, (_, index) => data.subarray(4 * index, 4 * index + 3));
}

/** A canvas as wide as its place; `paint(brush, width, colors)` is called again when width or scheme changes, `height(width)` in CSS pixels. */
function surface(label, height, paint) {
  const canvas = el("canvas", { class: "surface", role: "img", tabindex: 0, "aria-label": label });
  const box = el("div", { class: "surfacebox" }, canvas);
  let painted = 0;
  canvas.repaint = () => {
    const width = box.clientWidth;
    if (!width) return;
    const tall = Math.round(height(width)),
      ratio = Math.max(2, window.devicePixelRatio || 1);
    if (canvas.width !== width * ratio || canvas.height !== tall * ratio) {
      canvas.width = width * ratio;
      canvas.height = tall * ratio;
      canvas.style.setProperty("height", `${tall}px`);
    }
    painted = width;
    const brush = canvas.getContext("2d");
    brush.setTransform(ratio, 0, 0, ratio, 0, 0);
    brush.clearRect(0, 0, width, tall);
    brush.font = "11px ui-sans-serif, system-ui, 'DejaVu Sans', sans-serif";
    paint(brush, width, palette());
  };
  waiting.push(canvas);
  new ResizeObserver(() => {
    if (box.clientWidth !== painted) canvas.repaint();
  }).observe(box);
  return { box, canvas };
}

for (const query of ["(prefers-color-scheme: dark)", "print"]) {
  matchMedia(query).addEventListener("change", () => {
    /** @type {NodeListOf<any>} */
    const surfaces = document.querySelectorAll("canvas.surface");
    for (const canvas of surfaces) canvas.repaint?.();
  });
}

/** As much of a text as fits. */
function clipped(brush, text, room) {
  if (brush.measureText(text).width <= room) return text;
  let end = text.length;
  while (end > 1 && brush.measureText(`${text.slice(0, end)}…`).width > room) end -= 1;
  return `${text.slice(0, end)}…`;
}

/** Every how many places a label of `size` pixels has room. */
function every(pitch, size) {
  return [1, 2, 5, 10, 20, 50, 100, 200, 500].find((step) => step * pitch >= size) ?? 1000;
}

/**
 * A matrix. `rows` and `columns` are {label, short}; `share(r, c)` is −1 to 1, null where nothing was measured,
 * `raw(r, c)` is the number itself, `over(r, c)` true beyond the scale; `text(r, c)` is printed where a cell has room; `say(r, c)` is read out.
 * `chosen()` is {row} or {column}; `choose(r, c)` follows a click or the arrow keys.
 */
function matrix({ label, rows, columns, share, raw, over = null, text, say, chosen, choose, corner }) {
  const readout = el(
    "output",
    { class: "readout" },
    "point at a cell, or focus the figure and use the arrow keys",
  );
  const top = columns.some((column) => column.label !== column.short) ? 66 : 18;
  let cell = { row: -1, column: -1 },
    bitmap = null,
    place = null;
  const layout = (width) => {
    const left = Math.min(110, 14 + 6.4 * Math.max(...rows.map((row) => row.label.length), corner.length));
    const wide = Math.min(48, (width - left - 2) / columns.length);
    return { left, wide, tall: Math.max(3, Math.min(24, 640 / rows.length)) };
  };
  const paint = (brush, width, colors) => {
    place = layout(width);
    bitmap =
      bitmap?.scheme === colors["heat-low"]
        ? bitmap
        : bitmapOf(rows.length, columns.length, share, over, colors);
    paintMatrix(brush, {
      ...place,
      top,
      corner,
      rows,
      columns,
      text,
      share,
      marks: chosen(),
      cell,
      bitmap: bitmap.canvas,
      colors,
    });
  };
  const { box, canvas } = surface(label, (width) => top + layout(width).tall * rows.length + 2, paint);
  canvas.numbers = () => [
    [corner, ...columns.map((column) => column.label)],
    ...rows.map((row, r) => [row.label, ...columns.map((_, c) => raw(r, c))]),
  ];
  const point = (row, column) => {
    if (row === cell.row && column === cell.column) return;
    cell = { row, column };
    const present = row >= 0 && column >= 0 && row < rows.length && column < columns.length;
    if (present) readout.textContent = say(row, column);
    canvas.repaint();
  };
  /** @type {(event: MouseEvent) => [number, number]} */
  const under = (event) => [
    Math.floor((event.offsetY - top) / place.tall),
    Math.floor((event.offsetX - place.left) / place.wide),
  ];
  const inside = ([row, column]) => row >= 0 && column >= 0 && row < rows.length && column < columns.length;
  canvas.addEventListener("pointermove", (event) => {
    if (place) point(...(inside(under(event)) ? under(event) : [-1, -1]));
  });
  canvas.addEventListener("pointerleave", () => point(-1, -1));
  canvas.addEventListener("click", (event) => {
    if (place && inside(under(event))) choose(...under(event));
  });
  canvas.addEventListener("keydown", (event) => {
    const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[
      event.key
    ] ?? [0, 0];
    if (!down && !right) return;
    event.preventDefault();
    event.stopPropagation();
    const from =
      cell.row < 0
        ? { row: Math.max(0, chosen().row ?? 0), column: Math.max(0, chosen().column ?? 0) }
        : cell;
    /** @type {[number, number]} */
    const next = [
      Math.max(0, Math.min(rows.length - 1, from.row + down)),
      Math.max(0, Math.min(columns.length - 1, from.column + right)),
    ];
    choose(...next);
    point(...next);
  });
  return {
    node: el("div", null, box, readout),
    changed: () => {
      bitmap = null;
      canvas.repaint();
    },
    repaint: () => canvas.repaint(),
  };
}

/** One pixel a cell; unmeasured cells stay clear. */
function bitmapOf(height, width, share, over, colors) {
  const canvas = el("canvas", { width, height });
  const brush = canvas.getContext("2d");
  const image = brush.createImageData(width, height);
  const plus = shades(colors["heat-low"], colors["heat-high"]),
    minus = shades(colors["heat-low"], colors.wrong);
  const beyond = [];
  for (let row = 0; row < height; row++)
    for (let column = 0; column < width; column++) {
      const value = share(row, column);
      if (value === null) continue;
      const level = Math.min(SHADES - 1, Math.round(Math.abs(value) * (SHADES - 1)));
      image.data.set((value < 0 ? minus : plus)[level], 4 * (row * width + column));
      image.data[4 * (row * width + column) + 3] = 255;
      if (over?.(row, column)) beyond.push([row, column]);
    }
  brush.putImageData(image, 0, 0);
  return { canvas: Object.assign(canvas, { beyond }), scheme: colors["heat-low"] };
}

function paintMatrix(
  brush,
  { left, top, wide, tall, corner, rows, columns, text, share, marks, cell, bitmap, colors },
) {
  const right = left + wide * columns.length,
    bottom = top + tall * rows.length;
  brush.imageSmoothingEnabled = false;
  brush.drawImage(bitmap, left, top, right - left, bottom - top);
  brush.strokeStyle = colors.card;
  brush.lineWidth = 1;
  brush.beginPath();
  if (wide > 8)
    for (let x = left + wide; x < right; x += wide) {
      brush.moveTo(x, top);
      brush.lineTo(x, bottom);
    }
  if (tall > 8)
    for (let y = top + tall; y < bottom; y += tall) {
      brush.moveTo(left, y);
      brush.lineTo(right, y);
    }
  brush.stroke();
  // Beyond the scale: a corner cut off, so that a sink is not taken for the top of the scale.
  brush.fillStyle = colors["on-high"];
  const size = Math.min(6, wide / 2, tall / 2);
  for (const [row, column] of bitmap.beyond) {
    const x = left + (column + 1) * wide,
      y = top + row * tall;
    brush.beginPath();
    brush.moveTo(x - size, y);
    brush.lineTo(x, y);
    brush.lineTo(x, y + size);
    brush.fill();
  }
  labelMatrix(brush, { left, top, wide, tall, corner, rows, columns, marks, colors });
  if (wide >= 34 && tall >= 14)
    numberCells(brush, { left, top, wide, tall, rows, columns, text, share, colors });
  brush.lineWidth = 2;
  brush.strokeStyle = colors.accent;
  if (marks.row >= 0) brush.strokeRect(left - 1, top + marks.row * tall - 0.5, right - left + 2, tall + 1);
  if (marks.column >= 0)
    brush.strokeRect(left + marks.column * wide - 0.5, top - 1, wide + 1, bottom - top + 2);
  brush.strokeStyle = colors.wrong;
  if (cell.row >= 0)
    brush.strokeRect(left + cell.column * wide - 0.5, top + cell.row * tall - 0.5, wide + 1, tall + 1);
}

function labelMatrix(brush, { left, top, wide, tall, corner, rows, columns, marks, colors }) {
  brush.textBaseline = "middle";
  brush.textAlign = "right";
  const down = every(tall, 13),
    along = every(wide, 22);
  rows.forEach((row, index) => {
    const selected = index === marks.row;
    if (!selected && ((row.place ?? index) % down || Math.abs(index - marks.row) * tall < 13)) return;
    brush.fillStyle = selected ? colors.accent : colors.soft;
    brush.fillText(clipped(brush, row.label, left - 10), left - 6, top + (index + 0.5) * tall);
  });
  brush.fillStyle = colors.soft;
  brush.fillText(corner, left - 6, top - 9);
  columns.forEach((column, index) => {
    const x = left + (index + 0.5) * wide;
    brush.fillStyle = index === marks.column ? colors.accent : colors.soft;
    if (column.place !== undefined) {
      if (index !== marks.column && column.place % along) return;
      brush.textAlign = "center";
      brush.fillText(column.short, x, top - 9);
    } else if (wide >= 9 || column.label.length > 3) {
      brush.save();
      brush.translate(x, top - 4);
      brush.rotate(-Math.PI / 2);
      brush.textAlign = "left";
      if (wide >= 9) brush.fillText(clipped(brush, column.label, top - 6), 0, 0);
      brush.restore();
    }
  });
}

function numberCells(brush, { left, top, wide, tall, rows, columns, text, share, colors }) {
  brush.textAlign = "center";
  for (let row = 0; row < rows.length; row++) {
    for (let column = 0; column < columns.length; column++) {
      const value = share(row, column);
      if (value === null) continue;
      brush.fillStyle = Math.abs(value) > 0.5 ? colors["on-high"] : colors.ink;
      brush.fillText(text(row, column), left + (column + 0.5) * wide, top + (row + 0.5) * tall);
    }
  }
}

/**
 * Bars of several quantities over the same places, under one another: {title, unit, bars: [{values, kind}], show}.
 * `chosen()` is the place that is marked, `choose(place)` follows a click.
 */
function tracks({ label, places, rows, say, chosen, choose }) {
  const readout = el("output", { class: "readout" }, "point at a step");
  const tall = 54,
    gap = 24,
    left = 64;
  let pointed = -1;
  const pitch = (width) => Math.min(46, (width - left - 4) / places.length);
  const paint = (brush, width, colors) => {
    const wide = pitch(width),
      right = left + wide * places.length;
    rows.forEach((row, index) => {
      const top = index * (tall + gap) + gap - 8;
      const max = Math.max(
        ...row.bars.flatMap((bars) => bars.values.filter((value) => typeof value === "number")),
        0,
      );
      brush.textBaseline = "middle";
      brush.textAlign = "left";
      brush.fillStyle = colors.ink;
      brush.fillText(row.title, left, top - 8);
      brush.fillStyle = colors.soft;
      brush.textAlign = "right";
      brush.fillText(row.show(max), left - 6, top + 5);
      brush.fillText("0", left - 6, top + tall - 2);
      brush.fillStyle = colors.line;
      brush.fillRect(left, top + tall, right - left, 1);
      for (const bars of row.bars)
        bars.values.forEach((value, place) => {
          if (typeof value !== "number" || !max) return;
          const size = (tall * value) / max;
          brush.fillStyle = place === chosen() ? colors.accent : colors[bars.kind];
          const inset = bars.kind === "neutral" ? 0 : Math.min(3, wide * 0.15);
          brush.globalAlpha = bars.kind === "neutral" ? 0.5 : 1;
          brush.fillRect(
            left + place * wide + inset,
            top + tall - size,
            Math.max(1, wide - 2 * inset - (wide > 4 ? 1 : 0)),
            size,
          );
          brush.globalAlpha = 1;
        });
    });
    const bottom = rows.length * (tall + gap) + 6;
    const along = every(wide, 22);
    brush.textAlign = "center";
    places.forEach((name, place) => {
      brush.fillStyle = place === chosen() ? colors.accent : colors.soft;
      if (place === chosen() || (!((place + 1) % along) && Math.abs(place - chosen()) * wide > 16))
        brush.fillText(name, left + (place + 0.5) * wide, bottom);
    });
    brush.strokeStyle = colors.wrong;
    brush.lineWidth = 1;
    if (pointed >= 0) brush.strokeRect(left + pointed * wide, 4, wide, bottom - 16);
  };
  const { box, canvas } = surface(label, () => rows.length * (tall + gap) + 16, paint);
  const under = (event) => {
    const place = Math.floor((event.offsetX - left) / pitch(box.clientWidth));
    return place >= 0 && place < places.length ? place : -1;
  };
  canvas.numbers = () => {
    const series = rows.flatMap((row) => row.bars.map((bars) => [row.title, bars.values]));
    return [
      ["step", ...series.map(([title]) => title)],
      ...places.map((name, place) => [name, ...series.map(([, values]) => values[place])]),
    ];
  };
  const point = (place) => {
    if (place === pointed) return;
    pointed = place;
    if (place >= 0) readout.textContent = say(place);
    canvas.repaint();
  };
  canvas.addEventListener("pointermove", (event) => point(under(event)));
  canvas.addEventListener("pointerleave", () => point(-1));
  canvas.addEventListener("click", (event) => {
    if (under(event) >= 0) choose(under(event));
  });
  canvas.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    event.stopPropagation();
    const next = Math.max(0, Math.min(places.length - 1, chosen() + by));
    choose(next);
    readout.textContent = say(next);
  });
  return { node: el("div", null, box, readout), repaint: () => canvas.repaint() };
}
