// The inside: heads that point at a tool, and the layer from which the choice is readable.

const TARGET = { chosen: "the chosen tool", right: "the right tool" };

function headCard(measured) {
  if (!measured) return null;
  const place = el("div", null);
  const draw = (target) =>
    place.replaceChildren(
      ...headParts(
        measured,
        measured.targets.find((entry) => entry.target === target),
      ),
    );
  const choices = measured.targets.map((entry) => [entry.target, `toward ${TARGET[entry.target]}`]);
  draw(choices[0][0]);
  return figure(
    "Heads",
    "AUROC: how often a head reads the target’s definition more than another tool’s of the same task, given slot and length. 0.5: no better than chance.",
    choices.length > 1 && el("div", { class: "controls" }, segmented("Target", choices, choices[0][0], draw)),
    place,
  );
}

function headParts(measured, entry) {
  const ablations = measured.ablation.filter((row) => row.target === entry.target);
  return [
    headMap(entry),
    readings(
      [
        entry.survivors !== null && [
          "heads above chance",
          entry.survivors,
          `of ${entry.auroc.flat().length}, p < 0.05 corrected for their number · n ${entry.n}`,
        ],
        entry.held_out && [
          "held-out AUROC of the best",
          number(entry.held_out.value),
          `${range(entry.held_out, number)} · n ${entry.held_out.n}, chosen on the other half of the tasks`,
        ],
        ...entry.held_out_halves.map((half, index) => [
          `chosen on half ${index}`,
          number(half.value),
          `${range(half, number)} · n ${half.n}`,
        ]),
      ].filter(Boolean),
    ),
    ...ablations.map(ablationTable),
  ]
    .flat()
    .filter(Boolean);
}

function headMap(entry) {
  const rows = entry.layers.map((layer, row) => ({
    kind: "heat",
    label: String(layer),
    after: [number(Math.max(...entry.auroc[row]))],
    cells: entry.auroc[row].map((value, head) =>
      value === null
        ? null
        : {
            value: Math.max(0, 2 * value - 1),
            text: number(value),
            mark: entry.p[row][head] < 0.05 ? "significant" : "",
            go: { layer, head },
            say: `layer ${layer}, head ${head}: AUROC ${number(value)} (all heads together: ${within(entry.low[row][head], entry.high[row][head])}), corrected p ${number(entry.p[row][head], 2)}, n ${entry.n}`,
          },
    ),
  }));
  const columns = entry.auroc[0].map((_, head) => ({
    label: head % 5 === 0 ? String(head) : "",
    title: `head ${head}`,
  }));
  return [
    heatmap({ columns, corner: "layer, head →", groups: [rows], max: 1, after: ["best"], shape: "heads" }),
    legend(1, "AUROC; a dot: corrected p < 0.05", (share) => number(0.5 + share / 2)),
  ];
}

function ablationTable(row) {
  const how = row.replace === "mean" ? "their mean" : "zero";
  const all = [row.chosen, row.random, ...row.alone.map((head) => head.effect)];
  const [min, max] = scaleOf(all);
  const line = (label, measured, kind) =>
    measured &&
    el(
      "tr",
      { class: kind },
      el("th", { scope: "row" }, label),
      rangeTrack(measured, min, max, kind),
      el("td", { class: "num" }, counted(measured, nats)),
    );
  const accuracy = Object.entries({
    base: "unchanged",
    chosen: "without them",
    random: "without random heads",
  })
    .filter(([name]) => row.accuracy[name])
    .map(([name, label]) => [
      `accuracy, ${label}`,
      percent(row.accuracy[name].value),
      `${range(row.accuracy[name], percent)} · n ${row.accuracy[name].n}`,
    ]);
  return el(
    "div",
    null,
    el(
      "h4",
      null,
      `Without the heads that point best at ${TARGET[row.target]} (reads set to ${how}): change in its log-odds, nats`,
    ),
    scrollBox(
      el(
        "table",
        { class: "why" },
        el(
          "tbody",
          null,
          line("chosen heads", row.chosen, ""),
          line("as many random heads", row.random, "control"),
          row.alone.map((head) => line(`layer ${head.layer}, head ${head.head} alone`, head.effect, "")),
          el("tr", null, el("td", null), el("td", null, scaleEnds(min, max, nats)), el("td", null)),
        ),
      ),
    ),
    readings([
      row.rank && [
        "p against random sets",
        number(row.rank.value, 2),
        `${plural(row.rank.n, "set")}; share of sets with as large a loss ${range(row.rank, percent)}`,
      ],
      ...accuracy,
    ]),
    el("p", { class: "caution" }, "Heads were chosen on one half of the tasks and ablated on the other."),
  );
}

// -- layers -------------------------------------------------------------------------------------------------------

const STATE = { decision: "the decision’s state", request: "the request’s state" };

function layerCard(measured) {
  if (!measured) return null;
  const title = "Where it becomes readable";
  const how =
    "A linear probe matches a state with the state of each tool’s definition and says which tool fits, on held-out tasks. Its control is trained on targets drawn at random with the same popularity.";
  if (measured.missing)
    return figure(title, how, el("p", { class: "absent" }, `No h_context: ${measured.missing}`));
  const place = el("div", null);
  const draw = (index) => place.replaceChildren(...probeParts(measured.probes[Number(index)]));
  const name = (probe) =>
    `${TARGET[probe.target]}${probe.names_tools ? ", by name," : ""} from ${STATE[probe.state]}`;
  draw(0);
  return figure(
    title,
    how,
    el(
      "div",
      { class: "controls" },
      dropdown(
        "read",
        measured.probes.map((probe, index) => [String(index), name(probe)]),
        draw,
      ),
    ),
    place,
  );
}

function probeParts(probe) {
  const layers = probe.accuracy.map(([layer]) => layer);
  const last = layers[layers.length - 1];
  const step = Math.max(1, Math.ceil(layers.length / 8));
  const x = scaleFrom(layers[0] - 0.5, last + 0.5, {
    ticks: layers.filter((_, index) => index % step === 0),
    show: String,
  });
  const series = [
    { kind: "control", points: pointsOf(probe.control, "control, layer", probe.n) },
    { kind: "", points: pointsOf(probe.accuracy, "layer", probe.n) },
  ];
  const levels = probe.chance === null ? [] : [{ y: probe.chance, label: `chance ${percent(probe.chance)}` }];
  const marks =
    probe.decodable === null ? [] : [{ x: probe.decodable, label: `readable from layer ${probe.decodable}` }];
  const at = (rows, index) =>
    rows[index] && { value: rows[index][1], low: rows[index][2], high: rows[index][3], n: probe.n };
  return [
    plot({
      title: "Accuracy by layer",
      x,
      y: SHARE(),
      xLabel: "layer (dashed: chance; hollow: control tasks)",
      series,
      levels,
      marks,
      shape: "wide",
    }),
    readings([
      [
        "decodable layer",
        probe.decodable ?? "none",
        "the first above both controls and chance, all layers at once",
      ],
      ["chance", percent(probe.chance), `n ${probe.n}`],
    ]),
    numbersOf(
      `numbers (${plural(layers.length, "layer")})`,
      ["layer", "accuracy", "control", "selectivity", "AUROC"],
      layers.map((layer, index) => [
        layer,
        counted(at(probe.accuracy, index), percent),
        counted(at(probe.control, index), percent),
        counted(at(probe.selectivity, index)),
        counted(at(probe.auroc, index)),
      ]),
    ),
    el(
      "p",
      { class: "caution" },
      "The control’s range holds 95 % of the control tasks. Readable is not used: whether the choice depends on it, only interventions tell.",
    ),
  ];
}

// -- P(action | state) --------------------------------------------------------------------------------------------

function actionCard(rows) {
  if (!rows) return null;
  const line = (label, measured, kind) =>
    measured &&
    el(
      "tr",
      { class: kind },
      el("th", { scope: "row" }, label),
      rangeTrack(measured, 0, 1, kind),
      el("td", { class: "num" }, counted(measured, percent)),
    );
  const unit = (measured) => `nats, ${range(measured, number)} · n ${measured.n}`;
  return figure(
    "P(action | state)",
    "The model first states an intention, then chooses; summed over intentions this is another way to the same choice. The direct choice is taken on the same tasks.",
    rows.map((row) => [
      el("h4", null, `Intentions, ${row.kind}: accuracy`),
      scrollBox(
        el(
          "table",
          { class: "why" },
          el(
            "tbody",
            null,
            line("over intentions", row.p_action_accuracy, ""),
            line("direct", row.p_action_accuracy_direct, "control"),
            line("the same choice", row.p_action_agreement, ""),
            el("tr", null, el("td", null), el("td", null, scaleEnds(0, 1, percent)), el("td", null)),
          ),
        ),
      ),
      readings([
        row.intention_information && [
          "intentions say of the action",
          number(row.intention_information.value),
          `${unit(row.intention_information)} (mutual information)`,
        ],
        row.intention_empty && [
          "empty or no language",
          percent(row.intention_empty.value + row.intention_degenerate.value),
          `of the draws, mean of ${row.intention_empty.n} tasks; where it is more than half a task has no P(action | state)`,
        ],
        row.p_action_gap && [
          "gap to the direct choice",
          number(row.p_action_gap.value),
          `${unit(row.p_action_gap)} (Jensen–Shannon)`,
        ],
      ]),
    ]),
  );
}
