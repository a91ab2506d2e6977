// Prompting as a bias: what the layers of one variant show, and what its vectors say. The table above is the template's.

/** @type {[string, string, string[][]][]} title, unit, lines: [kind, label, measure, control] */
const PARTS = [
  [
    "Shift recovered by the mean difference",
    "share of KL, 1 is all",
    [
      ["own", "added", "patch_recovery"],
      ["removal", "taken out", "patch_removal"],
      ["other", "other family’s", "patch_recovery", "other_family"],
      ["random", "random", "patch_recovery", "random"],
    ],
  ],
  [
    "State in the task’s subspace",
    "share of its squared length",
    [
      ["own", "this variant", "manifold_alignment"],
      ["removal", "bare input", "bare"],
      ["other", "other family’s", "manifold_alignment", "other_family"],
      ["random", "random", "manifold_alignment", "random"],
    ],
  ],
  ["Shift in the logit lens", "KL(variant‖base), nats", [["own", "this variant", "lens_kl"]]],
];
const LOWEST = -1; // of what is drawn: a control can lead away without end

function biasCard(measured) {
  if (!measured) return null;
  const whole = document.getElementById("bias");
  const place = el("div", { class: "columns" });
  const variants = Object.keys(measured.curves);
  const draw = (variant) =>
    place.replaceChildren(biasLayers(measured, variant), biasVectors(measured.vectors[variant]));
  if (
    !Object.values(measured.curves).some((curves) => curves.length) &&
    !measured.vectors[measured.first].length
  )
    return whole;
  draw(measured.first);
  whole.append(
    el(
      "div",
      { class: "controls" },
      "Variant ",
      segmented(
        "Variant",
        variants.map((name) => [name, name]),
        measured.first,
        draw,
      ),
    ),
    place,
  );
  return whole;
}

function biasLayers(measured, variant) {
  const rowsOf = (of, measure, control = null) =>
    measure === "bare"
      ? measured.bare
      : measured.curves[of].find((curve) => curve.measure === measure && curve.control === control)?.points;
  const all = Object.keys(measured.curves);
  const drawn = PARTS.filter(([, , lines]) => all.some((of) => rowsOf(of, lines[0][2])));
  const layers = [
    ...new Set(
      drawn.flatMap(([, , lines]) =>
        all.flatMap((of) => (rowsOf(of, lines[0][2]) ?? []).map(([layer]) => layer)),
      ),
    ),
  ].sort((a, b) => a - b);
  const step = Math.max(1, Math.ceil(layers.length / 8));
  const x = scaleFrom(layers[0], layers[layers.length - 1], {
    ticks: layers.filter((_, index) => index % step === 0),
    show: String,
  });
  let cut = false;
  const plots = drawn.map(([title, unit, lines]) => {
    const name = lines[0][2],
      n = measured.n[name];
    const present = lines
      .map(([kind, label, measure, control]) => [kind, label, rowsOf(variant, measure, control)])
      .filter(([, , rows]) => rows);
    const values = all
      .flatMap((of) =>
        lines.flatMap(([, , measure, control]) =>
          (rowsOf(of, measure, control) ?? []).flatMap(([, ...three]) => three),
        ),
      )
      .filter((value) => typeof value === "number");
    const low = Math.min(0, ...values);
    if (low < LOWEST) cut = true;
    const y =
      name === "lens_kl"
        ? roundScale([0, ...values], (value) => String(Number(value.toPrecision(3))))
        : halves(Math.max(low, LOWEST));
    return plot({
      title: [title, el("small", null, ` ${unit} · n\u00a0${n}`)],
      x,
      y,
      xLabel: "",
      levels: low < 0 ? [{ y: 0, label: "0" }] : [],
      shape: `named${name === "lens_kl" ? " low" : ""}`,
      series: present.map(([kind, label, rows]) => ({
        kind,
        label,
        points: pointsOf(rows, `${label}, layer`, n),
      })),
    });
  });
  if (!plots.length) return el("div", null);
  const head = [
    "layer",
    ...drawn.flatMap(([title, , lines]) =>
      lines.map(
        ([, label]) =>
          `${title.split(" ")[0] === "State" ? "in subspace" : lines.length > 1 ? "recovered" : "lens"}: ${label}`,
      ),
    ),
  ];
  const numbers = layers.map((layer) => [
    layer,
    ...drawn.flatMap(([, , lines]) =>
      lines.map(([, , measure, control]) => {
        const row = rowsOf(variant, measure, control)?.find(([at]) => at === layer);
        return row ? estimate({ value: row[1], low: row[2], high: row[3] }) : "–";
      }),
    ),
  ]);
  return el(
    "div",
    null,
    plots,
    el(
      "p",
      { class: "xlabel layers" },
      "layer (residual stream behind the block, at the last prompt position)",
    ),
    el(
      "p",
      { class: "how" },
      `Bands are 95 % intervals over tasks; scales are the same for every variant.${cut ? " What lies below −1 is drawn at −1." : ""}`,
    ),
    numbersOf(`numbers (${plural(layers.length, "layer")})`, head, numbers),
  );
}

function biasVectors(vectors) {
  if (!vectors.length) return el("div", null);
  const chips = (name, rows) =>
    rows.length > 0 &&
    el(
      "p",
      { class: "tokens" },
      el("span", null, name),
      rows
        .slice(0, 5)
        .map(([text, value]) => el("code", null, shownToken(text), el("small", null, ` ${change(value)}`))),
    );
  const name = (vector) => vector.family ?? (vectors.length > 1 ? "all tasks as one" : "all tasks");
  return el(
    "div",
    null,
    el("h4", null, "What the vector says", el("small", null, " mean shift, nats")),
    vectors.map((vector) =>
      el(
        "div",
        { class: "vector" },
        el(
          "p",
          null,
          el("b", null, name(vector)),
          el(
            "small",
            null,
            vector.r2 &&
              ` R² ${number(vector.r2.value, 2)} (${within(vector.r2.low, vector.r2.high, (value) => number(value, 2))})`,
            ` · n ${vector.n}`,
          ),
        ),
        chips("raises", vector.promoted),
        chips("lowers", vector.demoted),
      ),
    ),
    el(
      "p",
      { class: "how" },
      "Tokens likely with or without the prompt, ␣ a space. R² with its 95 % interval, none below eight tasks.",
    ),
    numbersOf(
      "all tokens listed",
      ["vector", "end", "token", "nats"],
      vectors.flatMap((vector) =>
        ["promoted", "demoted"].flatMap((end) =>
          vector[end].map(([text, value]) => [name(vector), end, shownToken(text), change(value)]),
        ),
      ),
    ),
  );
}

/** A scale to 1 with a tick each half. */
function halves(low) {
  const ticks = [-1, -0.5, 0, 0.5, 1].filter((tick) => tick > low - 0.5);
  return scaleFrom(ticks[0], 1, { ticks, show: (value) => String(value).replace("-", "−") });
}

/** A token with its white space made visible. */
function shownToken(text) {
  return text.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥");
}
