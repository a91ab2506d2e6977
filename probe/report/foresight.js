// What is there before a call runs, and how well it foretells a wrong choice.

const SIGNAL = {
  margin: ["margin", "first minus second, nats"],
  entropy: ["entropy", "of the choice, turned round"],
  log_odds_gap: ["log-odds gap", "chosen minus the tools’ mean"],
  attention_margin: ["attention margin", "to the chosen tool, per token"],
  order_agreement: ["order agreement", "orders with the same choice"],
  candidate_mass: ["candidate mass", "on all names together"],
  log_prob: ["log P", "of the chosen name"],
  linear_probe: ["linear probe", "of resid_post; layer chosen on other folds"],
  best: ["best", "signal chosen on other folds"],
};
const RULE = { raw: "", held_out: "other folds", transfer: "from the other run" };

function foresightCard(measured) {
  if (!measured) return null;
  const gaps = measured.missing.map((text) => el("p", { class: "caution" }, `Not measured: ${text}.`));
  const base = readings([["wrong choices", percent(measured.base.value), range(measured.base, percent)]]);
  const title = "Could the error be foreseen?";
  const how =
    "Signals that are there before the call runs. AUROC is how often a wrong choice has less of the signal than a right one: ½ says nothing. AURC is the mean share of wrong choices when only the surest are accepted.";
  if (!measured.signals.length) return figure(title, how, base, gaps, readoutTable(measured.readouts));
  const place = el("div", null);
  const name = (row) => `${SIGNAL[row.signal][0]}${row.rule === "transfer" ? " (other run)" : ""}`;
  const draw = (index) => place.replaceChildren(riskPlot(measured, measured.curves[Number(index)], name));
  draw("0");
  return figure(
    title,
    how,
    base,
    signalTable(measured),
    el(
      "p",
      { class: "caution" },
      `A random order has AURC ${number(measured.base.value)}${measured.lowest ? `, the best possible one ${number(measured.lowest.value)}` : ""}. Gain is 0 for the one and 1 for the other. p counts permuted labels that do as well, choices included.`,
    ),
    el("h4", null, "Risk at each coverage"),
    el(
      "div",
      { class: "controls" },
      segmented(
        "Signal",
        measured.curves.map((row, index) => [String(index), name(row)]),
        "0",
        draw,
      ),
    ),
    place,
    layerForesight(measured),
    measured.chosen.length > 0 &&
      el(
        "p",
        { class: "caution" },
        `Best on the other folds: ${measured.chosen.map(([signal, folds]) => `${SIGNAL[signal][0]} in ${folds} of 5`).join(", ")}.`,
      ),
    gaps,
    readoutTable(measured.readouts),
  );
}

const READOUT = {
  guess: ["guess", "even, among the tools"],
  attention: ["attention", "per token, of the head that is best on other folds"],
  cosine: ["cosine", "decision’s state with the description’s"],
  linear_probe: ["linear probe", "of both states, fitted on other folds"],
  prompted: ["another prompt", "the model’s choice in the other run"],
};

/** Accuracy of what the same forward would have chosen under another readout. */
function readoutTable(rows) {
  if (!rows.length) return null;
  return [
    el("h4", null, "Repair: what another readout would choose among the tools"),
    estimateTable(
      [
        ["readout"],
        ["right"],
        ["gain", "over the model"],
        ["repaired", "of its failures"],
        ["broken", "of its successes"],
        ["overlap", "with another prompt"],
      ],
      rows.map((row) => [
        ...(row.scorer === null ? ["the model", "its most probable tool"] : READOUT[row.scorer]),
        row.readout_accuracy && [row.readout_accuracy, percent],
        row.readout_gain,
        row.repaired && [row.repaired, percent],
        row.broken && [row.broken, percent],
        row.repair_overlap,
      ]),
    ),
  ];
}

function signalTable(measured) {
  return estimateTable(
    [
      ["signal"],
      ["AUROC", "½ is chance"],
      ["p"],
      ["AURC", "lower is better"],
      ["gain", "0 random, 1 best"],
      ["Brier gain", "over the base rate"],
      ["ECE", "by chance"],
      ["errors", "least sure ÷ surest quarter"],
    ],
    measured.signals.map((row) => [
      SIGNAL[row.signal][0],
      [SIGNAL[row.signal][1], RULE[row.rule]].filter(Boolean).join(" · "),
      row.auroc,
      row.auroc_p && [{ ...row.auroc_p, low: null, high: null }],
      row.aurc,
      row.aurc_gain,
      row.brier_gain,
      row.ece && [
        row.ece,
        (value) =>
          value === row.ece.value && row.ece_floor
            ? `${number(value)} (${number(row.ece_floor.value)})`
            : number(value),
      ],
      row.error_ratio,
    ]),
  );
}

function riskPlot(measured, curve, name) {
  const points = curve.points.map(([coverage, risk, low, high]) => ({
    x: coverage,
    y: risk,
    low,
    high,
    say: `coverage ${percent(coverage)}: ${percent(risk)} wrong (95 % ${interval(low, high, percent)})`,
  }));
  return el(
    "div",
    null,
    plot({
      title: `Wrong among the surest, by ${name(curve)}`,
      x: SHARE(),
      y: SHARE(),
      xLabel: "share of choices accepted → share of them wrong",
      series: [{ kind: "", points }],
      levels: [{ y: measured.base.value, label: "base rate: a random order" }],
    }),
    numbersOf(
      `numbers (${plural(points.length, "coverage")})`,
      ["accepted", "wrong", "95 % interval"],
      points.map((point) => [percent(point.x), percent(point.y), interval(point.low, point.high, percent)]),
    ),
  );
}

function layerForesight(measured) {
  if (!measured.layers.length) return null;
  const last = measured.layers[measured.layers.length - 1][0];
  const points = pointsOf(measured.layers, "layer", measured.base.n);
  return [
    plot({
      title: "AUROC of the linear probe, every layer by itself",
      x: scaleFrom(0, Math.max(1, last), { ticks: [0, last] }),
      y: SHARE(),
      xLabel: "layer",
      series: [{ kind: "", points }],
      levels: [{ y: 0.5, label: "chance" }],
    }),
    numbersOf(
      `numbers (${plural(points.length, "layer")})`,
      ["layer", "AUROC", "95 % interval"],
      measured.layers.map(([layer, value, low, high]) => [layer, number(value), interval(low, high)]),
    ),
  ];
}
