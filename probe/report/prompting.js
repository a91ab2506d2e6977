// One prompting task: what every variant does to the distribution of the first answer token.

const SHIFTS = [
  ["kl", "KL(variant‖base)", "nats"],
  ["js", "JS", "nats, at most 0.693"],
  ["tv", "TV", "0 to 1"],
  ["entropy_change", "entropy change", "nats"],
  ["log_odds_shift", "log-odds shift of the target", "nats"],
];

function promptingDetail(task) {
  return [shiftFigure(task.variants), choiceFigure(task.variants), ...task.variants.map(variantText)];
}

function shiftFigure(variants) {
  const top = {};
  for (const [name] of SHIFTS) {
    const sizes = variants
      .map((variant) => variant[name])
      .filter((value) => typeof value === "number")
      .map(Math.abs);
    top[name] = name === "js" ? Math.LN2 : name === "tv" ? 1 : Math.max(0, ...sizes);
  }
  const rows = variants.map((variant) => {
    const target = variant.choices.find((choice) => choice.choice === variant.target);
    return el(
      "tr",
      null,
      el("th", { scope: "row" }, variant.variant),
      el(
        "td",
        null,
        variant.chosen === null ? "–" : el("q", null, variant.chosen),
        " ",
        variant.score === null ? null : verdict(variant.score),
      ),
      el("td", { class: "num" }, probability(target?.probability), bar(target?.probability ?? 0, "chosen")),
      SHIFTS.map(([name]) => shiftCell(variant, name, top[name])),
    );
  });
  const head = [
    ["variant"],
    ["chosen"],
    ["P(target)", "among choices"],
    ...SHIFTS.map(([, text, unit]) => [text, unit]),
  ];
  return figure(
    "Shift of the first answer token’s distribution",
    "Every variant against the bare input (base), over the whole vocabulary. 0 means that the prompt changed nothing.",
    scrollBox(
      el(
        "table",
        { class: "bars shifts" },
        el(
          "thead",
          null,
          el(
            "tr",
            null,
            head.map(([text, unit], index) =>
              el("th", { class: index > 1 ? "num" : "" }, text, unit ? el("small", null, unit) : null),
            ),
          ),
        ),
        el("tbody", null, rows),
      ),
    ),
  );
}

function shiftCell(variant, name, top) {
  if (variant.variant === "base") return el("td", { class: "num muted" }, "reference");
  const value = variant[name];
  if (typeof value !== "number") return el("td", { class: "num muted" }, number(value));
  const signed = name === "entropy_change" || name === "log_odds_shift";
  return el(
    "td",
    { class: "num" },
    signed ? change(value) : number(value),
    signed ? signedBar(top ? value / top : 0) : bar(top ? value / top : 0),
  );
}

function choiceFigure(variants) {
  const choices = variants[0].choices.map((choice) => choice.choice);
  if (!choices.length) return null;
  const rows = variants.map((variant) => ({
    kind: "heat",
    label: variant.variant,
    after: [number(variant.candidate_mass)],
    cells: variant.choices.map((choice) => ({
      value: choice.probability,
      text: probability(choice.probability),
      say: `${variant.variant} · ${choice.choice.trim()}: P ${number(choice.probability, 4)}, log P ${number(choice.log_prob, 4)} nats`,
    })),
  }));
  const columns = choices.map((choice) => ({
    label: choice,
    mark: choice === variants[0].target ? "target" : "",
  }));
  return figure(
    "Probability of each choice",
    "Softmax over the choices’ log-probabilities; the target is underlined. Mass: how much of the model’s probability is on the choices at all.",
    heatmap({ columns, corner: "", groups: [rows], max: 1, after: ["mass"], numbers: true }),
    legend(1, "probability among choices", number),
  );
}

function variantText(variant) {
  const head = `${variant.variant} · ${variant.n_prompt} + ${variant.n_new} tokens, ended by ${variant.finish_reason}`;
  const cut = variant.truncation && el("p", { class: "notice" }, `Shortened: ${variant.truncation.rule}.`);
  return el(
    "details",
    { class: "passage" },
    el("summary", null, head),
    cut,
    promptText(variant.pieces),
    tokenKey(variant),
    ...tokenText(variant),
  );
}

/** Means over all tasks, by variant. */
function variantOverview(rows) {
  if (!rows.length) return null;
  const cell = (row, name, show) => {
    if (!row[name])
      return el(
        "td",
        { class: "num muted" },
        row.variant === "base" && name !== "accuracy" ? "reference" : "–",
      );
    const [value, low, high] = row[name];
    return el("td", { class: "num" }, show(value), el("small", null, interval(low, high, show)));
  };
  const head = ["variant", "accuracy", ...SHIFTS.map(([, text]) => text), "tasks"];
  return figure(
    "By prompt variant",
    "Means over tasks with 95 % intervals (none for the shifts below eight tasks), all against the bare input.",
    scrollBox(
      el(
        "table",
        { class: "plain" },
        el(
          "thead",
          null,
          el(
            "tr",
            null,
            head.map((text, index) => headCell(text, index ? "num" : "")),
          ),
        ),
        el(
          "tbody",
          null,
          rows.map((row) =>
            el(
              "tr",
              null,
              el("th", { scope: "row" }, row.variant),
              cell(row, "accuracy", percent),
              SHIFTS.map(([name]) => cell(row, name, name.includes("_") ? change : number)),
              el("td", { class: "num" }, row.n),
            ),
          ),
        ),
      ),
    ),
  );
}
