// Attribution: which layers, heads and sources write the log-odds of two tools, beside what masks take away.

const PAIR = {
  first_two: ["chosen against second", "the most probable tool against the second"],
  chosen_right: ["chosen against right", "the most probable tool, where it is wrong, against the right one"],
};
const SOURCE = {
  tool: "its own description",
  other_tool: "the other’s description",
  tools: "all other descriptions",
  user: "the request",
  earlier: "earlier messages",
  name: "the name so far",
  bos: "bos (sink)",
};

/** The run's card; null where nothing was taken apart. */
function attributionCard(pairs) {
  if (!pairs) return null;
  const place = el("div", null);
  const draw = (name) =>
    place.replaceChildren(...attributionParts(pairs.find((entry) => entry.pair === name)));
  const choices = pairs.map((entry) => [entry.pair, PAIR[entry.pair][0]]);
  draw(choices[0][0]);
  return figure(
    "What writes the choice",
    "The log-odds of two whole names as a sum over what wrote them, nats: right of 0 for the first of the two. Counted is what goes straight to the logits, norms held at their scale.",
    choices.length > 1 && el("div", { class: "controls" }, segmented("Pair", choices, choices[0][0], draw)),
    place,
  );
}

function attributionParts(entry) {
  const source = (name) => SOURCE[name] ?? name;
  const masked = entry.sources.some((row) => row.knockout);
  return [
    readings([
      [
        PAIR[entry.pair][1],
        `${nats(entry.log_odds.value)} nats`,
        `${range(entry.log_odds, nats)} · n ${entry.log_odds.n} · parts sum to it within ${number(entry.remainder.value, 1)}`,
      ],
      ...entry.parts.map((row) => [
        row.part.replaceAll("_", " "),
        nats(row.effect.value),
        range(row.effect, nats),
      ]),
    ]),
    attributionTable(
      "Sources that heads read, and what masking the same description from the decision on takes away",
      entry.sources.map((row) => [source(row.source), row.effect, masked && row.knockout]),
      masked ? ["written", "lost when masked"] : ["written"],
    ),
    attributionTable(
      "Heads with the largest mean",
      entry.heads.map((row) => [
        `${row.layer}.${row.head}: ${row.reads.map(([name, value]) => `${source(name)} ${nats(value)}`).join(", ")}`,
        row.effect,
      ]),
      ["written, interval for all heads together"],
    ),
    attributionTable(
      "Layers",
      entry.layers.map((row) => [`layer ${row.layer}`, row.attention, row.mlp]),
      ["attention", "MLP"],
    ),
    el(
      "p",
      { class: "caution" },
      "Attribution is no cause: what a later layer makes of a read is counted as that layer’s, a mask takes both away. ",
      entry.spearman
        ? `Over ${plural(entry.spearman.n, "description")} the two go together with ρ ${number(entry.spearman.value)} (${range(entry.spearman, number)}).`
        : "",
    ),
  ];
}

/** Rows of a label and one estimate a column, on one scale. */
function attributionTable(title, rows, columns) {
  const [min, max] = scaleOf(rows.flatMap(([, ...effects]) => effects));
  const cells = (effect) =>
    effect
      ? [
          rangeTrack(effect, min, max),
          el("td", { class: "num", title: plural(effect.n, "task") }, nats(effect.value)),
        ]
      : [el("td", null), el("td", null)];
  return el(
    "div",
    null,
    el("h4", null, title),
    scrollBox(
      el(
        "table",
        { class: "why" },
        el(
          "thead",
          null,
          el(
            "tr",
            null,
            headCell(""),
            columns.flatMap((text) => [headCell(text), headCell("")]),
          ),
        ),
        el(
          "tbody",
          null,
          rows.map(([label, ...effects]) =>
            el(
              "tr",
              null,
              el("th", { scope: "row" }, label),
              columns.flatMap((_, index) => cells(effects[index])),
            ),
          ),
        ),
      ),
    ),
  );
}
