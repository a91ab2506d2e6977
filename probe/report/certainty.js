// How sure the choices are, how right, and what the temperature of the choice does to both.

const SWEPT = [
  ["tau_entropy", "Entropy, nats"],
  ["tau_top1", "P of the most probable"],
  ["tau_accuracy", "P of the right ones"],
  ["tau_log_loss", "Log loss, nats"],
];

function certaintyCard(measured) {
  if (!measured) return null;
  const place = el("div", null);
  const draw = (kind) => place.replaceChildren(...reliability(measured, kind));
  if (measured.fitted) draw("width");
  return figure(
    "How sure, how right",
    "Confidence is the probability of the most probable entry, no tool included. On the diagonal it is right as often as it is sure; below, it is surer than right.",
    measured.fitted &&
      el(
        "div",
        { class: "controls" },
        segmented(
          "Bins",
          [
            ["width", "bins of equal width"],
            ["mass", "bins of equally many tasks"],
          ],
          "width",
          draw,
        ),
      ),
    measured.fitted
      ? place
      : el(
          "p",
          { class: "caution" },
          `${plural(measured.n, "task")}: fewer than ${measured.min_tasks} are not calibrated`,
        ),
    measured.fitted && scoreTable(measured),
    temperature(measured),
    sweep(measured),
  );
}

function reliability(measured, kind) {
  const reliabilityPlot = (which, title) => {
    const bins = measured.bins[kind][which];
    const points = bins.map((bin) => ({
      x: bin.confidence,
      y: bin.value,
      low: bin.low,
      high: bin.high,
      say: `confidence ${number(bin.confidence)}: right ${percent(bin.value)} (95 % ${interval(bin.low, bin.high, percent)}), n ${bin.n}`,
    }));
    return el(
      "div",
      null,
      plot({
        title,
        x: SHARE(),
        y: SHARE(),
        xLabel: "confidence → share right",
        series: [{ kind: "", points }],
        diagonal: true,
        joined: false,
        shape: "square",
      }),
      numbersOf(
        `numbers (${plural(bins.length, "bin")})`,
        ["confidence", "right", "95 % interval", "tasks"],
        bins.map((bin) => [
          number(bin.confidence),
          percent(bin.value),
          interval(bin.low, bin.high, percent),
          bin.n,
        ]),
      ),
    );
  };
  return [
    el(
      "div",
      { class: "plots" },
      reliabilityPlot("raw", "Raw, τ = 1"),
      reliabilityPlot("fitted", "τ fitted on other tasks"),
    ),
  ];
}

const SCORES = {
  log_loss: ["log loss", "nats"],
  brier: ["Brier score", "of the most probable candidate, 0 to 1"],
  brier_multiclass: ["Brier score", "over all candidates, 0 to 2"],
  ece: ["ECE", "calibration error, 0 to 1"],
  ece_floor: ["ECE by chance", "of a calibrated model as confident"],
};

function scoreTable(measured) {
  const rows = measured.scores.map((row) => {
    const [label, note] = SCORES[row.name];
    const bins = row.bins && ` · bins of equal ${row.bins}`;
    return [label, note + (bins ?? ""), row.raw, row.fitted];
  });
  if (measured.gain) rows.push(["gain in log loss", "raw minus fitted, nats", null, measured.gain]);
  return [
    estimateTable([["on held-out tasks"], ["raw", "τ = 1"], ["fitted", "τ of the other folds"]], rows),
    el(
      "p",
      { class: "caution" },
      "ECE is never negative, so with few tasks it is too large: compare it with what chance gives. 95 % intervals: Wilson for shares, else over resampled tasks; of chance, the range of draws.",
    ),
  ];
}

function temperature(measured) {
  if (!measured.fitted) return null;
  const [low, high] = measured.tau_range;
  return readings([
    ["fitted τ", number(measured.fitted.value), `${range(measured.fitted, number)} · n ${measured.fitted.n}`],
    measured.at_bound && [
      "no best τ",
      "at the end of the range",
      `log loss still falls at an end of ${low} to ${high}`,
    ],
    ["τ without each fold", measured.folds.map((tau) => number(tau)).join(" · ")],
  ]);
}

function sweep(measured) {
  const taus = measured.sweep.tau_entropy.map(([tau]) => tau);
  const x = () =>
    scaleFrom(taus[0], taus[taus.length - 1], {
      ticks: [0.125, 1, 8].filter((tau) => tau >= taus[0]),
      power: true,
      show: (tau) => (tau === 0.125 ? "⅛" : String(tau)),
    });
  const fitted =
    measured.fitted && measured.fitted.value >= taus[0] && measured.fitted.value <= taus[taus.length - 1];
  const plots = SWEPT.map(([name, title], index) => {
    const rows = measured.sweep[name];
    const y =
      index === 1 || index === 2 ? SHARE() : roundScale([0, ...rows.flat(1).filter((_, place) => place % 4)]);
    return plot({
      title,
      x: x(),
      y,
      xLabel: "τ",
      series: [{ kind: "", points: pointsOf(rows, "τ", measured.n) }],
      marks: fitted ? [{ x: measured.fitted.value, label: "fitted" }] : [],
    });
  });
  return [
    el("h4", null, "The temperature of the choice, τ in softmax(log P / τ)"),
    el("div", { class: "plots" }, plots),
    numbersOf(
      `numbers (${plural(taus.length, "τ")}, means over ${plural(measured.n, "task")})`.replace("τs", "τ"),
      ["τ", ...SWEPT.map(([, title]) => title)],
      taus.map((tau, index) => [
        number(tau),
        ...SWEPT.map(([name]) => {
          const [, value, low, high] = measured.sweep[name][index];
          return estimate({ value, low, high });
        }),
      ]),
    ),
  ];
}
