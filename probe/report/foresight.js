// What is there before a call runs, and how well it foretells a wrong choice; texts come with the numbers.

function foresightCard(measured) {
  if (!measured) return null;
  const { title, how, tables, curves, missing } = measured;
  const note = (text) => el("p", { class: "caution" }, text);
  return figure(
    title,
    how,
    tables.map((table) => [
      el("h4", null, table.title),
      estimateTable(table.head, table.rows),
      note(table.note),
    ]),
    el("div", { class: "plots" }, curves.map(foresightCurve)),
    missing.map(note),
  );
}

function foresightCurve({ title, axis, level, points, n }) {
  const last = points[points.length - 1][0];
  return plot({
    title,
    x: scaleFrom(0, last || 1, { ticks: [0, last], show: String }),
    y: SHARE(),
    xLabel: axis,
    series: [{ kind: "", points: pointsOf(points, axis, n) }],
    levels: [level],
  });
}
