// Curves: dots with their intervals on two scales, over a band.

/** A scale from min to max with its ticks; `power` scales by powers of two. */
function scaleFrom(min, max, { ticks, power = false, show = number }) {
  const map = power ? Math.log2 : (value) => value;
  const [from, to] = [map(min), map(max)];
  return {
    ticks,
    show,
    at: (value) => Math.max(0, Math.min(1, (map(value) - from) / (to - from || 1))),
    /** The value of a place. */
    of: (share) => (power ? 2 ** (from + share * (to - from)) : from + share * (to - from)),
  };
}

/** A scale that holds these values, with round ticks: 1, 2 or 5 times a power of ten apart; whole ones are written so. */
function roundScale(values, show = null) {
  const present = values.filter((value) => typeof value === "number");
  const low = Math.min(...present),
    high = Math.max(...present);
  const width = (high - low || Math.abs(high) || 1) / 3;
  const power = 10 ** Math.floor(Math.log10(width));
  const step = [1, 2, 5, 10].find((times) => times * power >= width) * power;
  const shown = show ?? (Number.isInteger(step) ? (value) => count(value).replace("-", "−") : number);
  const first = Math.floor(low / step + 1e-9),
    last = Math.max(first + 1, Math.ceil(high / step - 1e-9));
  const ticks = Array.from({ length: last - first + 1 }, (_, index) => (first + index) * step);
  return scaleFrom(ticks[0], ticks[ticks.length - 1], {
    ticks,
    show: (value) => shown(Math.abs(value) < step / 2 ? 0 : value),
  });
}

const SHARE = () => scaleFrom(0, 1, { ticks: [0, 0.5, 1], show: (value) => String(value) });

/**
 * `series` are {kind, points: [{x, y, low, high, say}], label}, with a label a line that has it at its end; `marks` are {x, label}, upright; `levels` are {y, label}.
 * `diagonal` draws y = x. A point with `go` leads there; `boxed({left, right, bottom, top})` follows a box drawn with the pointer.
 */
function plot({
  title,
  x,
  y,
  xLabel,
  series,
  marks = [],
  levels = [],
  diagonal = false,
  joined = true,
  shape = "",
  boxed = null,
}) {
  const parts = [
    ...y.ticks.map((value) => el("i", { class: "rule", "--y": y.at(value) })),
    diagonal && el("i", { class: "diagonal" }),
    ...levels.map((level) => el("i", { class: "level", "--y": y.at(level.y), title: level.label })),
    ...marks.map((mark) =>
      el(
        "i",
        { class: x.at(mark.x) > 0.5 ? "mark late" : "mark", "--x": x.at(mark.x) },
        el("b", null, mark.label),
      ),
    ),
    ...series.flatMap(({ kind, points, label }) => seriesParts(kind, points, x, y, joined, label)),
    ...endNames(series, y),
  ];
  const area = el("div", { class: boxed ? "area boxed" : "area" }, parts);
  if (boxed) drawBox(area, x, y, boxed);
  const name = [title ?? xLabel].flat()[0];
  const drawn = el(
    "div",
    { class: `plot ${shape}` },
    title && el("h4", null, title),
    el(
      "div",
      { class: "plotbox", role: "img", "aria-label": name },
      el(
        "div",
        { class: "yticks" },
        y.ticks.map((value) => el("span", { "--y": y.at(value) }, y.show(value))),
      ),
      area,
      el(
        "div",
        { class: "xticks" },
        x.ticks.map((value) => el("span", { "--x": x.at(value) }, x.show(value))),
      ),
    ),
    el("p", { class: "xlabel" }, xLabel),
  );
  drawn.numbers = () => pointRows(series, xLabel || "x", name);
  return drawn;
}

/** The points of a plot as rows of cells; columns without a value anywhere are left out. */
function pointRows(series, xLabel, yLabel) {
  const head = ["line", xLabel.split(" → ")[0], xLabel.split(" → ")[1] ?? yLabel, "low", "high", "said"];
  const rows = series.flatMap(({ label, points }) =>
    points.map(({ x, y, low, high, say }) => [label, x, y, low, high, say]),
  );
  const kept = head.map((_, column) => rows.some((row) => (row[column] ?? "") !== ""));
  return [head, ...rows].map((row) => row.filter((_, column) => kept[column]));
}

/** A box over a plot, drawn with the pointer. */
function drawBox(area, x, y, boxed) {
  const box = el("i", { class: "selectbox", hidden: true });
  let start = null;
  const at = (event) => {
    const frame = area.getBoundingClientRect();
    const within_ = (value) => Math.max(0, Math.min(1, value));
    return [
      within_((event.clientX - frame.left) / frame.width),
      within_((frame.bottom - event.clientY) / frame.height),
    ];
  };
  const ends = (event) =>
    [start, at(event)].reduce(([a, b], [c, d]) => [
      [a, c].sort((p, q) => p - q),
      [b, d].sort((p, q) => p - q),
    ]);
  area.addEventListener("pointerdown", (event) => {
    start = at(event);
  });
  area.addEventListener("pointermove", (event) => {
    if (!start) return;
    const [across, up] = ends(event);
    box.hidden = false;
    for (const [name, value] of Object.entries({
      "--x": across[0],
      "--wide": across[1] - across[0],
      "--y": up[0],
      "--tall": up[1] - up[0],
    }))
      box.style.setProperty(name, String(value));
  });
  area.addEventListener("pointerup", (event) => {
    const [across, up] = ends(event);
    start = null;
    box.hidden = true;
    if (across[1] - across[0] > 0.02 || up[1] - up[0] > 0.02)
      boxed({ left: x.of(across[0]), right: x.of(across[1]), bottom: y.of(up[0]), top: y.of(up[1]) });
  });
  area.append(box);
}

/** Names beside the ends of lines, apart from each other. */
function endNames(series, y) {
  const apart = 0.1;
  const ends = series
    .map(({ kind, points, label }) => ({
      kind,
      label,
      last: points.findLast((point) => typeof point.y === "number"),
    }))
    .filter(({ label, last }) => label && last)
    .map((end) => ({ ...end, at: y.at(end.last.y) }))
    .sort((a, b) => a.at - b.at);
  ends.forEach((end, index) => {
    if (index) end.at = Math.max(end.at, ends[index - 1].at + apart);
  });
  let top = 1;
  for (const end of ends.reverse()) {
    end.at = Math.min(end.at, top);
    top = end.at - apart;
  }
  return ends.map((end) => el("b", { class: `end ${end.kind}`, "--y": end.at, title: end.label }, end.label));
}

function seriesParts(kind, points, x, y, joined, label) {
  const present = points.filter((point) => typeof point.y === "number");
  const bounded = present.filter((point) => typeof point.low === "number" && typeof point.high === "number");
  const place = (value, level) =>
    `${(100 * x.at(value)).toFixed(2)}% ${(100 * (1 - y.at(level))).toFixed(2)}%`;
  const band = joined &&
    bounded.length > 1 && [
      ...bounded.map((point) => place(point.x, point.high)),
      ...[...bounded].reverse().map((point) => place(point.x, point.low)),
    ];
  if (label) {
    // Both ways across the line, so that it is not thin where it is steep.
    const rises = (index) =>
      Math.sign((present[index + 1] ?? present[index]).y - (present[index - 1] ?? present[index]).y);
    const line = (by) =>
      present.map(
        (point, index) =>
          `calc(${(100 * x.at(point.x)).toFixed(2)}% + ${by * 0.8 * rises(index)}px) calc(${(100 * (1 - y.at(point.y))).toFixed(2)}% + ${by * 0.9}px)`,
      );
    return [
      band && el("i", { class: `band ${kind}`, "--shape": `polygon(${band.join(", ")})` }),
      el("i", {
        class: `stroke ${kind}`,
        "--shape": `polygon(${[...line(-1), ...line(1).reverse()].join(", ")})`,
      }),
      ...present.map((point) =>
        el("i", {
          class: `point small ${kind}`,
          "--x": x.at(point.x),
          "--y": y.at(point.y),
          title: point.say,
        }),
      ),
    ];
  }
  return [
    band && el("i", { class: `band ${kind}`, "--shape": `polygon(${band.join(", ")})` }),
    ...bounded.map((point) =>
      el("i", {
        class: `whisker ${kind}`,
        "--x": x.at(point.x),
        "--from": y.at(point.low),
        "--to": y.at(point.high),
      }),
    ),
    ...present.map((point) =>
      el("i", {
        class: `point ${kind}${point.go ? " leads" : ""}`,
        "--x": x.at(point.x),
        "--y": y.at(point.y),
        title: point.say,
        onclick: point.go && (() => address.set(point.go, true)),
      }),
    ),
  ];
}

/** [x, value, low, high] rows as the points of a curve. */
function pointsOf(rows, name, n) {
  return rows.map(([x, value, low, high]) => ({
    x,
    y: value,
    low,
    high,
    say: `${name} ${number(x)}: ${number(value)} (${within(low, high)}), n ${n}`,
  }));
}

/** The numbers of a figure, folded away. */
function numbersOf(text, head, rows) {
  return el("details", { class: "numbers" }, el("summary", null, text), plainTable(head, rows, 1, ""));
}

/** An estimate with its interval and the number of values behind it. */
function counted(measured, show = number) {
  if (!measured) return "–";
  const bounds = measured.low === null ? "" : `${interval(measured.low, measured.high, show)} · `;
  return [show(measured.value), el("small", null, ` ${bounds}n ${measured.n}`)];
}

/** A table of estimates: [label, note, …estimates or [estimate, show]], under a head of [label, note]. */
function estimateTable(head, rows, kind = "lines") {
  return scrollBox(
    el(
      "table",
      { class: `plain ${kind}` },
      el(
        "thead",
        null,
        el(
          "tr",
          null,
          head.map(([text, note], index) =>
            el("th", { class: index ? "num" : "" }, text, note && el("small", null, note)),
          ),
        ),
      ),
      el(
        "tbody",
        null,
        rows.map(([label, note, ...cells]) =>
          el(
            "tr",
            null,
            el("th", { scope: "row" }, label, note && el("small", null, " ", note)),
            cells.map((measured) =>
              el("td", { class: "num" }, Array.isArray(measured) ? counted(...measured) : counted(measured)),
            ),
          ),
        ),
      ),
    ),
  );
}
