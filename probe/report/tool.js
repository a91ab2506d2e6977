// One tool_selection task: P(tool | context), the call, and where the decision's row reads.

function toolDetail(task) {
  const request = task.pieces
    .filter(([label]) => label === "user")
    .map(([, text]) => text)
    .join(" … ");
  return [
    request ? el("blockquote", null, request) : el("blockquote", { class: "tail" }, promptEnd(task)),
    el("div", { class: "columns" }, probabilityFigure(task), callFigure(task)),
    whyFigure(task),
    task.attention
      ? attentionFigure(task)
      : notCaptured("Attention to the tools’ definitions", "attn_to_spans"),
    promptFigure(task, el("mark", { class: "completion" }, el("b", null, "generated"), task.completion)),
  ];
}

function probabilityFigure(task) {
  const rows = task.entries.map((entry) =>
    el(
      "tr",
      { class: entry.chosen ? "chosen" : "" },
      el("th", { scope: "row" }, entryName(entry.tool), " ", tags(entry)),
      el("td", { class: "wide" }, bar(entry.probability, entry.chosen ? "chosen" : "")),
      el("td", { class: "num" }, probability(entry.probability)),
      el("td", { class: "num" }, probability(entry.choice_probability)),
      el(
        "td",
        { class: "num", title: entry.tokens && `token by token: ${entry.tokens.map(nats).join(", ")} nats` },
        entry.log_prob.toFixed(2).replace("-", "−"),
      ),
    ),
  );
  const head = ["", "", "P", "among tools", "log P, nats"].map((text, index) =>
    headCell(text, index > 1 ? "num" : ""),
  );
  return figure(
    "P(tool | context)",
    "Each name is scored token by token in the slot of the call; P is the softmax over all entries, no tool included.",
    scrollBox(
      el("table", { class: "bars" }, el("thead", null, el("tr", null, head)), el("tbody", null, rows)),
    ),
    readings([
      ["margin", number(task.margin), "nats, first minus second"],
      ["entropy", number(task.entropy), `nats, at most ${number(Math.log(task.entries.length))}`],
      ["candidate mass", number(task.candidate_mass), "of the model’s probability is on these entries"],
    ]),
    otherScores(task),
  );
}

function callFigure(task) {
  const call = task.called === null ? "no shown tool" : task.called;
  return figure(
    "Generated call",
    "What the model writes when it goes on from the call’s opener.",
    tokenKey(task),
    ...tokenText(task, { before: el("span", { class: "muted" }, task.call_prefix ?? ""), kind: "call" }),
    readings([
      ["calls", call, task.call_error],
      ["ended by", task.finish_reason, plural(task.n_new, "token")],
      task.opener_log_prob !== null && [
        "log P(opener)",
        number(task.opener_log_prob),
        "nats: the opener is forced, not chosen",
      ],
    ]),
  );
}

// -- attention ------------------------------------------------------------------------------------------------

const ATTENTION = {
  mass: [
    "mass",
    "probability mass",
    "The share of the decision row’s attention that falls on each tool’s definition, by layer. A longer one collects more.",
  ],
  rate: [
    "per token",
    "mass per token",
    "Attention divided by the definition’s tokens, so that long ones do not win by their length.",
  ],
  share: [
    "share of tools",
    "share among tools",
    "Attention renormalized over the tools’ tokens alone: the softmax that sees nothing but tools.",
  ],
};

/** Mean over the chosen heads of one reading of the mass; null where no tool is read at all. */
function toolReading(attention, layer, heads, column, reading) {
  const n = attention.tools.length;
  let sum = 0,
    count = 0;
  for (const head of heads) {
    const mass = attention.ppm[layer][head];
    const value = mass[column] / 1e6;
    if (reading === "share") {
      const total = mass.slice(0, n).reduce((a, b) => a + b, 0) / 1e6;
      if (total === 0) continue;
      sum += value / total;
    } else sum += reading === "rate" ? value / attention.tokens[column] : value;
    count += 1;
  }
  return count ? sum / count : null;
}

function meanOf(values) {
  const present = values.filter((value) => value !== null);
  return present.length ? present.reduce((a, b) => a + b, 0) / present.length : null;
}

function attentionFigure(task) {
  const attention = task.attention;
  const { head } = address.state;
  const state = { reading: "rate", head: !attention.averaged && attention.ppm[0][head] ? head : "mean" };
  const place = el("div", null);
  const how = el("p", { class: "how" });
  const draw = () => {
    how.textContent = ATTENTION[state.reading][2];
    place.replaceChildren(...attentionChart(task, attention, state));
  };
  const heads = attention.averaged
    ? [["mean", `mean of ${attention.n_heads}`]]
    : [
        ["mean", `mean of ${attention.n_heads}`],
        ...attention.ppm[0].map((_, head) => [String(head), String(head)]),
      ];
  const controls = el(
    "div",
    { class: "controls" },
    segmented(
      "What to show",
      Object.entries(ATTENTION).map(([key, [text]]) => [key, text]),
      state.reading,
      (value) => {
        state.reading = value;
        draw();
      },
    ),
    dropdown(
      "head",
      heads,
      (value) => {
        state.head = value;
        draw();
        address.set({ head: value === "mean" ? null : value });
      },
      state.head,
    ),
  );
  draw();
  return el(
    "figure",
    null,
    el("figcaption", null, el("h3", null, "Attention to the tools’ definitions"), how),
    controls,
    place,
    attention.elsewhere.length > 0 &&
      readings(
        attention.elsewhere.map(([label, mass]) => [
          `mass on ${label}`,
          number(mass),
          "all layers and heads",
        ]),
      ),
    el(
      "p",
      { class: "caution" },
      "Correlational: this is where the row that emits the name reads. It is not P(tool), and the most attended tool is often not the chosen one. ",
      "bos is the attention sink; its mass, and the request’s, have their own scale from 0 to 1.",
    ),
  );
}

function attentionChart(task, attention, state) {
  const [, unit] = ATTENTION[state.reading];
  const heads = state.head === "mean" ? attention.ppm[0].map((_, head) => head) : [Number(state.head)];
  const who = state.head === "mean" ? `mean of ${plural(attention.n_heads, "head")}` : `head ${state.head}`;
  const read = (column, reading) =>
    attention.layers.map((_, layer) => toolReading(attention, layer, heads, column, reading));
  const rows = attention.tools.map((_, column) => read(column, state.reading));
  const max = Math.max(0, ...rows.flat().filter((value) => value !== null));
  const tools = attention.tools.map((tool, column) => {
    const entry = task.entries.find((candidate) => candidate.tool === tool);
    return {
      kind: "heat",
      label: [entryName(tool), " ", entry ? tags(entry) : null],
      after: [
        number(meanOf(rows[column])),
        number(attention.without_sink[column]),
        number(attention.norms[column]),
        attention.tokens[column],
      ],
      cells: rows[column].map((value, layer) =>
        cellOf(
          value,
          `layer ${attention.layers[layer]}, ${who} · ${tool}: ${number(value, 4)} ${unit} (${attention.tokens[column]} tokens)`,
          { layer: attention.layers[layer], tool },
        ),
      ),
    };
  });
  const beside = attention.beside.map((label, index) => {
    const column = attention.tools.length + index;
    const mass = read(column, "mass");
    return {
      kind: "strip",
      label: label === "bos" ? "bos (sink)" : "request",
      after: [number(meanOf(mass)), "", "", attention.tokens[column]],
      cells: mass.map((value, layer) =>
        cellOf(
          value,
          `layer ${attention.layers[layer]}, ${who} · ${label}: ${number(value, 4)} probability mass`,
        ),
      ),
    };
  });
  const columns = attention.layers.map((layer, index) => ({
    label: index % 5 === 0 ? String(layer) : "",
    title: `layer ${layer}`,
  }));
  return [
    heatmap({
      columns,
      corner: "layer",
      groups: [tools, beside],
      max,
      after: ["mean", "without sinks", "norm read", "tokens"],
    }),
    legend(max, `${unit}, ${who}; one decision row`, number),
  ];
}

function cellOf(value, say, go = null) {
  return value === null ? null : { value, text: number(value), say, go };
}
