// What the choices depend on: the scorer, the order of the tools, and which tool is taken for which.

const SCORER = {
  sum: "log P of the whole name",
  first_token: "its first token alone",
  mean_token: "per token of the name",
  mean_byte: "per byte of the name",
  pmi: "less log P without the request",
  contextual_calibration: "P over P without the request",
  orders: "mean P over orders",
  pmi_orders: "both",
};

function scorerCard(measured) {
  if (!measured) return null;
  const head = [
    ["scorer"],
    ["accuracy"],
    ["among tools", "tasks whose target is a tool"],
    ["position bias", "0: even over slots"],
    ["tool bias", "0: even over tools"],
    ["agrees with sum"],
    ["among tools"],
  ];
  const rows = measured.rows.map((row) => [
    row.scorer,
    SCORER[row.scorer],
    [row.accuracy, percent],
    [row.accuracy_tools, percent],
    row.position_bias,
    row.tool_bias,
    [row.agreement, percent],
    [row.agreement_tools, percent],
  ]);
  return figure(
    "Which scorer",
    "The same candidates, scored in other ways. Biases are ½ Σ |share − even share| of the choices among the tools in the order shown; a right tool that is often first, or often the same, makes them larger.",
    estimateTable(head, rows, ""),
  );
}

// -- confusion ----------------------------------------------------------------------------------------------------

function confusionCard(measured) {
  if (!measured) return null;
  return figure(
    "What is confused",
    `${plural(measured.n_wrong, "wrong choice")} in ${plural(measured.n, "task")}. A task with several right tools counts for the most probable of them.`,
    pairTable(measured.pairs),
    confusionMatrix(measured),
  );
}

function pairTable(pairs) {
  if (!pairs.length) return null;
  const head = [
    "right",
    "chosen instead",
    "in tasks with that right choice",
    "P of the wrong one, where both are shown",
  ];
  return [
    el("h4", null, "Most confused pairs"),
    plainTable(
      head,
      pairs.map((pair) => [
        entryName(pair.right),
        entryName(pair.chosen),
        counted(pair.share, percent),
        counted(pair.mass),
      ]),
      2,
    ),
  ];
}

function confusionMatrix(measured) {
  if (!measured.names.length) return null;
  const at = new Map(measured.cells.map((cell) => [`${cell[0]},${cell[1]}`, cell]));
  const name = (index) => measured.names[index] ?? "no tool";
  const rows = measured.names
    .map((tool, right) => ({ tool, right }))
    .filter(({ right }) => measured.right_n[right] > 0)
    .map(({ tool, right }) => ({
      kind: "heat",
      label: [`${right + 1} `, entryName(tool)],
      after: [measured.right_n[right]],
      cells: measured.names.map((_, chosen) => {
        const cell = at.get(`${right},${chosen}`);
        if (!cell) return null;
        const [, , hits, low, high] = cell,
          n = measured.right_n[right];
        return {
          value: hits / n,
          text: hits ? String(hits) : "·",
          mark: right === chosen ? "own" : "",
          go: hits && {
            tab: "tasks",
            task: null,
            only: null,
            q: `${exactly("right", name(right))} ${exactly("chosen", name(chosen))}`,
          },
          say: `right ${name(right)}, chosen ${name(chosen)}: ${hits} of ${n} tasks, ${percent(hits / n)} (95 % ${interval(low, high, percent)})`,
        };
      }),
    }));
  const columns = measured.names.map((tool, index) => ({
    label: String(index + 1),
    title: tool ?? "no tool",
  }));
  const rest =
    measured.left_out > 0 &&
    el("p", { class: "caution" }, `${measured.left_out} more that are confused less often are left out.`);
  return [
    el("h4", null, "Right (rows) and chosen (columns), tasks; a cell opens its tasks"),
    heatmap({
      columns,
      corner: "chosen →",
      groups: [rows],
      max: 1,
      after: ["tasks"],
      numbers: true,
      shape: "narrow",
    }),
    legend(1, "share of the row; hatched: never shown together", number),
    rest,
  ];
}

// -- order --------------------------------------------------------------------------------------------------------

const ORDER = {
  position_bias: ["position bias", "by probability", number],
  position_bias_choice: ["position bias", "by choice", number],
  tool_bias: ["tool bias", "by probability", number],
  tool_bias_choice: ["tool bias", "by choice", number],
  first_slot_probability: ["first slot", "probability", percent],
  first_slot_rate: ["first slot", "share of choices", percent],
  baseline_first_slot: ["first slot", "even share", percent],
  flip_rate: ["flip rate", "tasks in which two orders differ in their choice", percent],
  flip_rate_tools: ["flip rate", "the same among the tools alone", percent],
  accuracy_orders: ["accuracy", "of the mean over orders", percent],
  accuracy_orders_tools: ["accuracy among tools", "of the mean over orders", percent],
  accuracy_mean_order: ["accuracy", "of one order, on average", percent],
  accuracy_mean_order_tools: ["accuracy among tools", "of one order, on average", percent],
};

function orderCard(measured) {
  if (!measured) return null;
  const rows = measured.rows.map((row) => {
    const [label, note, show] = ORDER[row.name];
    return [label, note, [row.shown, show], [row.orders, show]];
  });
  const head = [
    ["among the tools"],
    ["as shown", "across tasks, each in its one order"],
    ["over orders", "orders averaged within each task"],
  ];
  return figure(
    "Order",
    "What the place of a tool in the list does to the choice. As shown, tools differ between slots as well: only over orders is a bias the place’s own.",
    estimateTable(head, rows),
    el(
      "p",
      { class: "caution" },
      "A bias is ½ Σ |share − even share|. It is never negative, so with few tasks it is too large: its interval may lie below it, and a row named chance is what exchanged places give.",
    ),
    slotTables(measured),
  );
}

function slotTables(measured) {
  if (!measured.slots.length) return null;
  const place = el("div", null);
  const draw = (count) =>
    place.replaceChildren(slotTable(measured.slots.find((group) => String(group.n_tools) === count)));
  const counts = measured.slots.map((group) => [String(group.n_tools), plural(group.n_tools, "tool")]);
  draw(counts[0][0]);
  return [
    el("h4", null, "Share of choices by slot"),
    counts.length > 1 &&
      el("div", { class: "controls" }, segmented("Tools shown", counts, counts[0][0], draw)),
    place,
  ];
}

function slotTable(group) {
  const max = Math.max(
    1 / group.n_tools,
    ...group.slots.flatMap((slot) =>
      [slot.shown, slot.orders].filter(Boolean).map((measured) => measured.high ?? measured.value),
    ),
  );
  const line = (label, measured, kind) =>
    measured &&
    el(
      "tr",
      { class: kind },
      el("th", { scope: "row" }, label),
      rangeTrack(measured, 0, max, kind),
      el("td", { class: "num" }, counted(measured, percent)),
    );
  const table = el(
    "table",
    { class: "why" },
    el(
      "tbody",
      null,
      group.slots
        .flatMap((slot, index) => [
          line(`slot ${index + 1}`, slot.orders ?? slot.shown, ""),
          slot.orders && line("as shown", slot.shown, "control"),
        ])
        .filter(Boolean),
      el(
        "tr",
        null,
        el("td", null),
        el("td", null, scaleEnds(0, max, percent)),
        el("td", { class: "num" }, `even: ${percent(1 / group.n_tools)}`),
      ),
    ),
  );
  return scrollBox(table);
}

// -- one task -----------------------------------------------------------------------------------------------------

/** The entries' probabilities under other scorers and over orders, folded away. */
function otherScores(task) {
  const names = Object.keys(task.scorers);
  if (names.length < 2 && !task.orders) return null;
  const head = ["", ...names, task.orders && "mean over orders"].filter((name) => name !== null);
  const rows = task.entries.map((entry, index) => [
    entryName(entry.tool),
    ...names.map((name) => probability(task.scorers[name][index])),
    ...(task.orders ? [counted(task.orders.entries[index], probability)] : []),
  ]);
  const bias =
    task.orders &&
    readings([
      task.orders.position_bias && ["position bias", counted(task.orders.position_bias), "orders"],
      task.orders.tool_bias && ["tool bias", counted(task.orders.tool_bias), "orders"],
      [
        "P of each slot",
        task.orders.slots.map((value) => number(value, 2)).join(" · "),
        "first to last, among tools",
      ],
    ]);
  const folded = numbersOf("under other scorers and orders", head, rows);
  if (bias) folded.append(bias);
  return folded;
}
