// What is there before a call runs, and how well it foretells a wrong choice; texts come with the numbers.

function foresightCard(measured) {
  if (!measured) return null;
  const place = el("div", null);
  const draw = (index) => place.replaceChildren(...curveOf(measured.curves[index]));
  if (measured.curves.length) draw("0");
  return figure(
    measured.title,
    measured.how,
    measured.tables.map(({ title, head, rows, note }) => [
      el("h4", null, title),
      estimateTable(head, rows),
      el("p", { class: "caution" }, note),
    ]),
    measured.curves.length > 0 &&
      el(
        "div",
        { class: "controls" },
        segmented(
          "Curve",
          measured.curves.map((curve, index) => [String(index), curve.name]),
          "0",
          draw,
        ),
      ),
    place,
    measured.missing.map((text) => el("p", { class: "caution" }, `Not measured: ${text}.`)),
  );
}

function curveOf({ title, axis, level, points, n }) {
  const last = points[points.length - 1][0];
  return [
    plot({
      title,
      x: scaleFrom(0, last || 1, { ticks: [0, last], show: String }),
      y: SHARE(),
      xLabel: axis,
      series: [{ kind: "", points: pointsOf(points, axis, n) }],
      levels: [level],
    }),
    numbersOf(
      `numbers; ${level.label}: ${number(level.y)}`,
      [axis, title, "95 % interval"],
      points.map(([x, value, low, high]) => [number(x), number(value), interval(low, high)]),
    ),
  ];
}
