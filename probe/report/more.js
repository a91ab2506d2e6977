// Measures without a card of their own: a picture each, of the kind that the definition names.

const LINE_KINDS = ["own", "removal", "other", "random"];
const LINES = 6; // lines of a curve, and matrices, that are drawn; all numbers are in the table

/** All of it, folded away and drawn when it is opened, for it can be thousands of rows: groups are {analyzer, measures}. */
function moreMeasures(groups, title) {
  if (!groups.length) return null;
  const count = groups.reduce((sum, group) => sum + group.measures.length, 0);
  const folded = el("details", { class: "more-measures" }, el("summary", null, `${title} (${count})`));
  const sections = () =>
    groups.map((group) =>
      el(
        "section",
        { "aria-label": group.analyzer },
        el("h3", null, group.analyzer),
        group.measures.map(measurePicture),
      ),
    );
  folded.addEventListener("toggle", () => folded.append(...sections()), { once: true });
  return folded;
}

function measurePicture(measure) {
  const draw = { curve: lineFigure, matrix: matrixFigure, bars: (bars) => scrollBox(barFigure(bars)) }[
    measure.kind
  ];
  const picture = draw ? draw(measure) : null;
  const source = measure.source ? ` (${measure.source})` : "";
  return el(
    "article",
    { class: "measure" },
    el("h4", { title: measure.means }, measure.name, el("small", null, ` ${measure.unit}`)),
    el(
      "p",
      { class: "how" },
      `${measure.means}${source}`,
      measure.interval && ` Interval: ${measure.interval}.`,
    ),
    picture ?? (["table", "text"].includes(measure.kind) ? null : scrollBox(rangeFigure(measure))),
    (picture || ["table", "text"].includes(measure.kind)) && placeTable(measure, !picture),
    measure.left_out > 0 &&
      el("p", { class: "caution" }, `${plural(measure.left_out, "more row")} in measures.parquet.`),
  );
}

/** The place of a row in words, without some of its axes. */
function placeOf(row, ...without) {
  return Object.entries(row.at)
    .filter(([axis]) => !without.includes(axis))
    .map(
      ([axis, label]) =>
        `${axis} ${typeof label !== "number" ? label : Number.isInteger(label) ? count(label) : number(label)}`,
    )
    .join(", ");
}

function numbersIn(rows) {
  return rows.flatMap((row) => [row.value, row.low, row.high]).filter((value) => typeof value === "number");
}

/** Rows by the place that is left without these axes. */
function seriesOf(rows, ...axes) {
  const series = new Map();
  for (const row of rows) {
    const key = placeOf(row, ...axes);
    series.set(key, [...(series.get(key) ?? []), row]);
  }
  return [...series];
}

/** estimates: a line a row, on a scale that shows 0. */
function rangeFigure(measure) {
  const values = [0, ...numbersIn(measure.rows)];
  const min = Math.min(...values),
    max = Math.max(...values) > min ? Math.max(...values) : min + 1;
  return el(
    "table",
    { class: "dots" },
    el(
      "tbody",
      null,
      measure.rows.map((row) =>
        el(
          "tr",
          null,
          el("th", { scope: "row" }, placeOf(row) || "run"),
          typeof row.value === "number" ? rangeTrack(row, min, max) : el("td", { class: "track" }),
          el("td", { class: "num" }, counted(row)),
        ),
      ),
    ),
  );
}

function barFigure(measure) {
  const most = Math.max(...numbersIn(measure.rows).map(Math.abs), 1e-12);
  const signed = measure.rows.some((row) => row.value < 0);
  return el(
    "table",
    { class: "dots" },
    el(
      "tbody",
      null,
      measure.rows.map((row) =>
        el(
          "tr",
          null,
          el("th", { scope: "row" }, placeOf(row) || "run"),
          el("td", { class: "track" }, (signed ? signedBar : bar)(row.value / most)),
          el("td", { class: "num" }, counted(row)),
        ),
      ),
    ),
  );
}

/** curve: a line for every place that is left without x; null where x is no number. */
function lineFigure(measure) {
  const x = measure.x;
  const rows = measure.rows.filter((row) => typeof row.at[x] === "number" && typeof row.value === "number");
  if (new Set(rows.map((row) => row.at[x])).size < 2) return null;
  const lines = seriesOf(rows, x).slice(0, LINES);
  const drawn = lines.flatMap(([, points]) => points);
  return plot({
    title: null,
    x: roundScale(drawn.map((row) => row.at[x])),
    y: roundScale([0, ...numbersIn(drawn)]),
    xLabel: x,
    shape: lines.length > 1 ? "named" : "wide",
    series: lines.map(([label, points], index) => ({
      kind: lines.length > 1 ? LINE_KINDS[index % LINE_KINDS.length] : "",
      label: lines.length > 1 ? label || "run" : null,
      points: points
        .sort((a, b) => a.at[x] - b.at[x])
        .map((row) => ({
          x: row.at[x],
          y: row.value,
          low: row.low,
          high: row.high,
          say: `${placeOf(row)}: ${number(row.value)} ${interval(row.low, row.high)}, n ${row.n}`,
        })),
    })),
  });
}

/** matrix: by × x, one for every place that is left without both; the color is the size. */
function matrixFigure(measure) {
  const { x, by } = measure;
  const rows = measure.rows.filter((row) => row.at[x] !== undefined && row.at[by] !== undefined);
  if (!rows.length) return null;
  const labels = (axis) =>
    [...new Set(rows.map((row) => row.at[axis]))].sort((a, b) =>
      typeof a === "number" && typeof b === "number"
        ? a - b
        : String(a).localeCompare(String(b), "en", { numeric: true }),
    );
  const columns = labels(x);
  const max = Math.max(...numbersIn(rows).map(Math.abs));
  return seriesOf(rows, x, by)
    .slice(0, LINES)
    .map(([title, cells]) => {
      const lines = labels(by).map((label) => ({
        label: String(label),
        kind: "heat",
        after: [],
        cells: columns.map((column) => {
          const row = cells.find((cell) => cell.at[x] === column && cell.at[by] === label);
          return row && typeof row.value === "number"
            ? {
                value: Math.abs(row.value),
                text: number(row.value, 2),
                say: `${placeOf(row)}: ${number(row.value)} ${measure.unit}`,
              }
            : null;
        }),
      }));
      return el(
        "div",
        null,
        title && el("h5", null, title),
        heatmap({
          columns: columns.map((column) => ({ label: String(column), title: `${x} ${column}` })),
          corner: `${by} × ${x}`,
          groups: [lines],
          max,
          after: [],
          numbers: columns.length <= 12,
        }),
      );
    });
}

/** A line a row. */
function placeTable(measure, open) {
  const cells = measure.rows.map((row) => [
    placeOf(row) || "run",
    number(row.value, 4),
    interval(row.low, row.high),
    count(row.n),
  ]);
  const table = numbersOf(
    `numbers (${plural(cells.length, "row")})`,
    ["where", measure.unit, "95 % interval", "n"],
    cells,
  );
  if (open) table.setAttribute("open", "");
  return table;
}
