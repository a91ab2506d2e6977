// The output distributions: against the temperature, their nuclei, their energies and their heat capacity.

function distributionCard(measured) {
  if (!measured) return null;
  return figure(
    "Output distributions",
    "Captured decisions, whole vocabulary, raw model. In Boltzmann’s form the energy of a token is E = −z and its probability exp(−E/τ)/Z.",
    nucleusDots(measured),
    fixedTable(measured),
    measured.n > 0 && temperatureCurves(measured),
  );
}

const POWERS = (low, high, wanted) => {
  const from = Math.floor(Math.log2(low)),
    to = Math.ceil(Math.log2(high));
  const step = Math.max(1, Math.ceil((to - from) / wanted));
  const ticks = [];
  for (let at = from; at <= to; at += step) ticks.push(2 ** at);
  return scaleFrom(2 ** from, 2 ** Math.max(to, from + 1), {
    ticks,
    power: true,
    show: (value) => (value < 1 ? `1/${1 / value}` : number(value)),
  });
};

function nucleusDots(measured) {
  if (!measured.dots.length) return null;
  const points = measured.dots.map(([entropy, size, task, step]) => ({
    x: entropy,
    y: size,
    low: null,
    high: null,
    say: `${task}, decision ${step}: entropy ${number(entropy)} nats, ${plural(size, "token")}`,
  }));
  const left = measured.decisions - measured.dots.length;
  return [
    el("h4", null, `Tokens of the nucleus (p = ${measured.p}) against the entropy: a dot a decision`),
    plot({
      title: null,
      x: roundScale([0, ...points.map((point) => point.x)]),
      y: POWERS(1, Math.max(2, ...points.map((point) => point.y)), 4),
      xLabel: "entropy, nats → tokens kept",
      series: [{ kind: "", points }],
      levels: measured.fixed.map((row) => ({ y: row.k, label: `top-k ${row.k}` })),
      joined: false,
    }),
    left > 0 && el("p", { class: "caution" }, `${plural(left, "more decision")} not drawn.`),
    numbersOf(
      `numbers (${plural(points.length, "decision")})`,
      ["decision", "entropy, nats", "tokens"],
      measured.dots.map(([entropy, size, task, step]) => [
        `${task} · ${step}`,
        number(entropy),
        number(size),
      ]),
    ),
  ];
}

function fixedTable(measured) {
  const rows = measured.fixed.map((row) => [
    `top-k ${row.k}`,
    null,
    [row.too_small, percent],
    [row.too_large, percent],
  ]);
  return [
    measured.follows &&
      readings([
        [
          "size follows entropy",
          number(measured.follows.value),
          `rank correlation, ${within(measured.follows.low, measured.follows.high)} · n ${measured.follows.n}`,
        ],
      ]),
    rows.length > 0 &&
      estimateTable(
        [
          ["fixed k"],
          ["too small", `fewer than the nucleus of ${measured.p}`],
          ["too large", "more than it"],
        ],
        rows,
      ),
  ];
}

function temperatureCurves(measured) {
  const { curves, energies } = measured;
  const taus = curves.entropy.map(([tau]) => tau);
  const x = () =>
    scaleFrom(taus[0], taus[taus.length - 1], {
      ticks: [0.125, 1, 8],
      power: true,
      show: (tau) => (tau === 0.125 ? "⅛" : String(tau)),
    });
  const values = (rows) => [0, ...rows.flatMap(([, ...rest]) => rest)];
  const against = (title, rows, y, marks) =>
    plot({
      title,
      x: x(),
      y,
      xLabel: "τ",
      series: [{ kind: "", points: pointsOf(rows, "τ", measured.n) }],
      marks,
    });
  const peak =
    measured.peak && measured.peak[0] >= taus[0] && measured.peak[0] <= taus[taus.length - 1]
      ? [{ x: measured.peak[0], label: "peak" }]
      : [];
  const nucleus = plot({
    title: "Mass of the most probable tokens",
    x: POWERS(1, curves.nucleus[curves.nucleus.length - 1][0], 4),
    y: SHARE(),
    xLabel: "tokens kept",
    series: [{ kind: "", points: pointsOf(curves.nucleus, "tokens", measured.n) }],
  });
  return [
    el(
      "h4",
      null,
      `Means over the first decision of ${plural(measured.n, "task")}, ${number(measured.d_vocab)} tokens in the vocabulary`,
    ),
    el(
      "div",
      { class: "plots" },
      against("Entropy, nats", curves.entropy, roundScale(values(curves.entropy)), []),
      against("P of the most probable", curves.top1, SHARE(), []),
      against(
        "Heat capacity Var(E)/τ², nats",
        curves.heat_capacity,
        roundScale(values(curves.heat_capacity)),
        peak,
      ),
      nucleus,
      energyPlot(energies),
    ),
    readings([
      measured.peak && [
        "heat capacity is highest at τ",
        number(measured.peak[0]),
        `mean over decisions, ${within(measured.peak[1], measured.peak[2])} · n ${measured.n}`,
      ],
    ]),
    numbersOf(
      `numbers (${taus.length} τ)`,
      ["τ", "entropy", "P of the most probable", "heat capacity"],
      taus.map((tau, at) => [
        number(tau),
        ...["entropy", "top1", "heat_capacity"].map((name) => {
          const [, value, low, high] = curves[name][at];
          return estimate({ value, low, high });
        }),
      ]),
    ),
    el(
      "p",
      { class: "caution" },
      "Energies are in the centred gauge (mean logit 0): a constant added to all logits moves E, F and log Z, and no probability.",
    ),
  ];
}

function energyPlot(energies) {
  const points = (rows, name) =>
    rows.map(([x, y]) => ({
      x,
      y,
      low: null,
      high: null,
      say: `E ${number(x)}: ${number(y)} per logit, ${name}`,
    }));
  const both = [...energies.all, ...energies.weighted];
  return el(
    "div",
    null,
    plot({
      title: "Energies of tokens, density per logit",
      x: roundScale(energies.all.map(([x]) => x)),
      y: roundScale([0, ...both.map(([, y]) => y)]),
      xLabel: "E, centred · filled: weighted by p · hollow: all tokens",
      series: [
        { kind: "control", points: points(energies.all, "all tokens") },
        { kind: "", points: points(energies.weighted, "weighted by p") },
      ],
      joined: false,
    }),
  );
}
