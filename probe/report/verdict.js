// The first screen's causal verdict: what the choice depends on, and what only goes together with that.

/** What was not measured, with the command that measures it. */
function notMeasured({ what, command }, kind = "notice") {
  return el("p", { class: kind }, `Not measured: ${what}. `, el("code", null, command));
}

/** Whether an interval leaves out what would be nothing. */
function effectWord(line, present) {
  if (line.low === null) return ["no interval", "too few tasks"];
  if (line.high < 0 && present === "go together") return ["go against each other", ""];
  return line.low > 0 || line.high < 0
    ? [present, ""]
    : [present === "an effect" ? "no effect found" : "not together", "the interval holds 0"];
}

function causeArticle(part) {
  const rows = (lines, min, max, present = "an effect") =>
    lines.map((line) => {
      const [word, note] = effectWord(line, present);
      const clear = line.low !== null && note === "";
      return el(
        "tr",
        { title: `${plural(line.n, "value")}; ${within(line.low, line.high)}` },
        el("th", { scope: "row" }, line.what),
        rangeTrack(line, min, max, clear ? "" : "control"),
        el("td", { class: "num" }, estimate(line, nats), el("small", null, ` ${line.unit} · n ${line.n}`)),
        el("td", { class: clear ? "word" : "word none", title: note }, word),
      );
    });
  const byUnit = [...new Set(part.lines.map((line) => line.unit))].map((unit) =>
    part.lines.filter((line) => line.unit === unit),
  );
  const bodies = byUnit.map((lines) => el("tbody", null, rows(lines, ...scaleOf(lines))));
  const correlates =
    part.correlates.length > 0 &&
    el(
      "tbody",
      { class: "correlates" },
      el(
        "tr",
        null,
        el("th", { scope: "rowgroup", colspan: 4 }, "Attention against cause, rank correlation within tasks"),
      ),
      rows(part.correlates, -1, 1, "go together"),
    );
  return el(
    "article",
    { class: "headline cause" },
    el(
      "p",
      null,
      el("b", null, part.how && part.lines.length ? `${part.title}: ` : part.title),
      part.lines.length > 0 && part.how,
    ),
    (bodies.length > 0 || correlates) &&
      scrollBox(el("table", { class: "why verdicts" }, bodies, correlates)),
    part.together && el("p", { class: "how" }, part.together),
    part.missing.map((missing) => notMeasured(missing, "caution")),
  );
}
