// Why this tool: what changes the choice when it is taken away, beside what only correlates with it.

const CAUSE = {
  "knockout description": ["description", "the description alone is hidden from every later token"],
  "knockout name": ["name", "the name alone is hidden: a call copies it, whichever tool is wanted"],
  "knockout parameters": ["parameters", "the parameters alone are hidden"],
  knockout: ["whole definition", "name, description and parameters are hidden"],
  knockout_decision: [
    "whole, at the decision alone",
    "all is hidden from the decision on; what earlier tokens read of it stays",
  ],
};
const ROLE = { chosen: "most probable tool", right: "right tool", other: "other tools" };

/** The run's card; null where nothing was masked or exchanged. */
function whyOverview(why) {
  if (!why) return null;
  const place = el("div", null);
  const draw = (name) =>
    place.replaceChildren(...causeParts(why.causes.find((cause) => cause.name === name)));
  const choices = why.causes.map((cause) => [cause.name, CAUSE[cause.name][0]]);
  if (choices.length) draw(choices[0][0]);
  return figure(
    "Why this tool?",
    "A cause is what changes the choice when it is taken away: here the attention to a tool’s description, to its name or to its whole definition is cut (knock-out), or two tools exchange their descriptions. Attention itself is only a correlate.",
    choices.length > 1 &&
      el("div", { class: "controls" }, segmented("What is hidden", choices, choices[0][0], draw)),
    place,
    why.windows.length > 0 && windowTable(why.windows),
    why.swap && swapReadings(why.swap),
  );
}

function causeParts(cause) {
  const [, how] = CAUSE[cause.name];
  return [
    el("p", { class: "how" }, `Knock-out: ${how}.`),
    nothingFound(cause.effects),
    el(
      "div",
      { class: "columns why-columns" },
      cause.effects.length > 0 && el("div", null, effectTable(cause.effects)),
      cause.correlates.length > 0 && el("div", null, correlateTable(cause.correlates)),
    ),
  ].filter(Boolean);
}

/** What was looked for and is not there, in one line. */
function nothingFound(effects) {
  const none = effects.filter(({ net }) => net && net.low !== null && net.low <= 0 && net.high >= 0);
  const told = none.map(
    ({ role, net }) => `${ROLE[role]} ${nats(net.value)} (${within(net.low, net.high, nats)}, n ${net.n})`,
  );
  return (
    none.length > 0 &&
    el("p", { class: "null" }, `No effect found beyond the random control: ${told.join("; ")}.`)
  );
}

function effectTable(effects) {
  const [min, max] = scaleOf(
    effects.flatMap((row) => [row.effect, row.control, row.net, row.other, row.beyond_other]),
  );
  const line = (label, measured, kind) =>
    measured &&
    el(
      "tr",
      { class: kind, title: plural(measured.n, "task") },
      el("th", { scope: "row" }, label),
      rangeTrack(measured, min, max, kind),
      el("td", { class: "num" }, estimate(measured, nats)),
    );
  return [
    el("h4", null, "Change in the tool’s log-odds, nats"),
    scrollBox(
      el(
        "table",
        { class: "why" },
        el(
          "tbody",
          null,
          effects
            .flatMap((row) => [
              line(ROLE[row.role], row.effect, ""),
              line("random control", row.control, "control"),
              line("beyond the random control", row.net, ""),
              line("another tool’s hidden", row.other, "control"),
              line("beyond another tool’s", row.beyond_other, ""),
            ])
            .filter(Boolean),
          el("tr", null, el("td", null), el("td", null, scaleEnds(min, max, nats)), el("td", null)),
        ),
      ),
    ),
    el(
      "p",
      { class: "caution" },
      `Means over ${plural(Math.max(...effects.map((row) => row.effect.n)), "task")} with 95 % intervals. The random control hides as many tokens elsewhere, the other the same of another tool: only what goes beyond both is about this text.`,
    ),
  ];
}

function correlateTable(rows) {
  const show = (measured) => (measured ? measured.value.toFixed(2).replace("-", "−") : "–");
  const cells = (measured) => [
    rangeTrack(measured, -1, 1),
    el(
      "td",
      {
        class: "num",
        title: measured && `${within(measured.low, measured.high)}, n ${measured.n}`,
      },
      show(measured),
    ),
  ];
  const head = ["", "within each task", "", "over all tools", ""].map((text, index) =>
    headCell(text, index % 2 ? "" : "num"),
  );
  const n = Math.max(...rows.flatMap((row) => [row.pooled?.n ?? 0, row.within?.n ?? 0]));
  return [
    el("h4", null, "Does it tell the cause? Spearman’s ρ with the loss by knock-out"),
    scrollBox(
      el(
        "table",
        { class: "why" },
        el("thead", null, el("tr", null, head)),
        el(
          "tbody",
          null,
          rows.map((row) =>
            el("tr", null, el("th", { scope: "row" }, row.label), cells(row.within), cells(row.pooled)),
          ),
          el(
            "tr",
            null,
            el("td", null),
            el("td", null, scaleEnds(-1, 1, number)),
            el("td", null),
            el("td", null, scaleEnds(-1, 1, number)),
            el("td", null),
          ),
        ),
      ),
    ),
    el(
      "p",
      { class: "caution" },
      `${n} pairs of task and tool; 95 % intervals over resampled tasks. 1: who has more of it loses more when hidden; 0: it says nothing of the cause. log P is part of the change itself.`,
    ),
  ];
}

function windowTable(windows) {
  const [min, max] = scaleOf(windows.map((row) => row.effect));
  return el(
    "div",
    null,
    el("h4", null, "Hidden at the decision in some layers alone: most probable tool, nats"),
    scrollBox(
      el(
        "table",
        { class: "why" },
        el(
          "tbody",
          null,
          windows.map((row) =>
            el(
              "tr",
              null,
              el("th", { scope: "row" }, `layers ${row.layers.join(" to ")}`),
              rangeTrack(row.effect, min, max),
              el("td", { class: "num" }, estimate(row.effect, nats)),
            ),
          ),
        ),
      ),
    ),
  );
}

function swapReadings(swap) {
  return el(
    "div",
    null,
    el("h4", null, "Two tools exchange their descriptions; names stay"),
    readings([
      swap.slope && [
        "goes with the description",
        number(swap.slope.value),
        `${range(swap.slope, number)} · 1: by description, 0: by name and place · ${plural(swap.slope.n, "pair")}`,
      ],
      swap.reversed && [
        "preference reversed",
        percent(swap.reversed.value),
        `${range(swap.reversed, percent)} · of ${plural(swap.reversed.n, "pair")}`,
      ],
      swap.first_two && [
        "reversed, two most probable tools",
        percent(swap.first_two.value),
        `${range(swap.first_two, percent)} · of ${plural(swap.first_two.n, "task")}`,
      ],
    ]),
  );
}

// -- one task -----------------------------------------------------------------------------------------------------

/** The tools side by side: probability, attention, and what changes the choice; null without interventions. */
function whyFigure(task) {
  if (!task.why) return null;
  const rows = task.entries.map((entry, index) => ({ ...entry, ...task.why.entries[index] }));
  const columns = whyColumns(task, rows).filter(([, , present]) => present);
  const head = columns.map(([title, note, , , kind]) =>
    el("th", { class: kind ?? "" }, title, el("small", null, note)),
  );
  const body = rows.map((row) =>
    el(
      "tr",
      { class: row.chosen ? "chosen" : "" },
      el("th", { scope: "row" }, entryName(row.tool), " ", tags(row)),
      columns.map(([, , , cell]) => cell(row)),
    ),
  );
  return figure(
    "Why this tool?",
    "Changes in log-odds against all other entries, nats: left of the middle the tool loses. Attention is beside them for comparison: it is a correlate.",
    scrollBox(
      el(
        "table",
        { class: "why cells" },
        el("thead", null, el("tr", null, headCell(""), head)),
        el("tbody", null, body),
      ),
    ),
    ...task.why.intentions.map(intentionReadings),
  );
}

/** [title, note, is anything there, cell of a row, class of the head], in reading order. */
function whyColumns(task, rows) {
  const effects = ["knockout", "knockout_decision", "scramble"];
  const sizes = rows
    .flatMap((row) => [
      ...[...effects.map((name) => row[name]), ...row.parts].map((effect) => effect?.value),
      row.swap,
    ])
    .filter((value) => typeof value === "number");
  const max = Math.max(...sizes.map(Math.abs), 1e-9);
  const signed = (value, note) =>
    el(
      "td",
      null,
      typeof value === "number"
        ? [signedBar(value / max), nats(value), note && el("small", null, note)]
        : "–",
    );
  const has = (name) => rows.some((row) => row[name] !== null && row[name] !== undefined);
  const control = (measured) => measured && `random ${nats(measured.value)}`;
  const chosen = task.chosen_tool;
  return [
    ["P", "direct", true, (row) => el("td", { class: "num" }, probability(row.probability)), "num"],
    ...task.why.intentions.map(({ kind }, index) => [
      "P over intentions",
      kind,
      true,
      (row) => el("td", { class: "num" }, estimate(row.p_action[index], probability)),
      "num",
    ]),
    [
      "attention",
      "per token",
      has("attention_rate"),
      (row) => el("td", { class: "num" }, number(row.attention_rate)),
      "num",
    ],
    ...["description", "name"].map((part, index) => [
      "knock-out",
      `${part} alone`,
      rows.some((row) => row.parts[index]),
      (row) => signed(row.parts[index]?.value),
    ]),
    [
      "knock-out",
      "whole definition",
      has("knockout"),
      (row) => signed(row.knockout?.value, control(row.knockout_random)),
    ],
    [
      "knock-out",
      "whole, at the decision alone",
      has("knockout_decision"),
      (row) => signed(row.knockout_decision?.value, control(row.knockout_decision_random)),
    ],
    [
      "exchange",
      `descriptions with ${chosen}`,
      has("swap"),
      (row) => signed(row.swap, reversed(task, row) && "overtakes it"),
    ],
    ["renamed", "a name that says nothing", has("scramble"), (row) => signed(row.scramble?.value)],
    [
      "removed",
      "total shift of the others",
      has("remove_tv"),
      (row) => el("td", { class: "num" }, number(row.remove_tv?.value)),
      "num",
    ],
    [
      "words",
      "largest changes when masked",
      rows.some((row) => row.words.length),
      (row) =>
        el(
          "td",
          { class: "words" },
          row.words.length
            ? row.words.map(([text, value]) => el("div", null, el("q", null, text), " ", nats(value)))
            : "–",
        ),
    ],
  ];
}

/** With the other's description the tool is the more probable of the two. */
function reversed(task, row) {
  const top = task.entries.find((entry) => entry.tool === task.chosen_tool);
  return (
    typeof row.swap === "number" &&
    top &&
    row.log_prob < top.log_prob &&
    row.log_prob - top.log_prob + row.swap > 0
  );
}

function intentionReadings(measured) {
  const say = (estimate_) =>
    estimate_ && estimate_.low !== null ? `nats, ${range(estimate_, number)}` : "nats";
  const numberRow = (name, label, note) =>
    measured[name] && [
      label,
      name === "intention_distinct" ? measured[name].value : number(measured[name].value),
      note,
    ];
  return readings([
    numberRow(
      "intention_distinct",
      `intentions, ${measured.kind}`,
      `distinct of ${measured.intention_distinct?.n}`,
    ),
    numberRow("intention_mass", "their probability", "of all intentions"),
    numberRow("intention_information", "they say of the action", say(measured.intention_information)),
    numberRow("p_action_gap", "gap to the direct choice", `${say(measured.p_action_gap)} (Jensen–Shannon)`),
    numberRow("intention_entropy", "entropy of intentions", say(measured.intention_entropy)),
  ]);
}
