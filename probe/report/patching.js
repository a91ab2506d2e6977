// Patching: how much of the choice comes over with which states of another prompt, beside those of a third one.

const DIFFER = {
  request: "another task’s request",
  description: "exchanged descriptions",
  system: "two system prompts",
  tasks: "two tasks",
};
const PATCH_MODE = { denoise: "clean into corrupt", noise: "corrupt into clean" };
const PAIR_STATUS = {
  ok: "patched",
  small_gap: "less than a nat apart",
  no_partner: "without a partner",
  not_scored: "names not scored in both",
  unaligned: "not aligned",
  no_room: "too long",
  not_finite: "not finite",
};

/** The run's card; null where nothing was patched. */
function patchingCard(kinds) {
  if (!kinds) return null;
  const place = el("div", null);
  const choices = kinds.flatMap((entry) =>
    entry.modes.map(({ mode }) => [`${entry.pair} ${mode}`, `${DIFFER[entry.pair]}: ${PATCH_MODE[mode]}`]),
  );
  if (!choices.length) return null;
  const draw = (name) => {
    const [pair, mode] = name.split(" ");
    const entry = kinds.find((kind) => kind.pair === pair);
    place.replaceChildren(
      ...patchingParts(
        entry,
        entry.modes.find((side) => side.mode === mode),
      ),
    );
  };
  draw(choices[0][0]);
  return figure(
    "What carries the choice from one prompt to another",
    "Share of the gap between the log-odds under two prompts that goes over with states of the one put into the other: 1 for the whole choice, 0 for nothing.",
    choices.length > 1 && el("div", { class: "controls" }, segmented("Pair", choices, choices[0][0], draw)),
    place,
  );
}

function patchingParts(entry, side) {
  const { sets } = entry;
  const sizes = sets.sizes.length && `${sets.sizes.map((row) => count(row.n_heads)).join(" and ")} heads`;
  return [
    readings([
      [
        "gap between the prompts",
        `${nats(entry.gap.value)} nats`,
        `${range(entry.gap, nats)} · n ${entry.gap.n}`,
      ],
      ...entry.pairs.map((row) => [PAIR_STATUS[row.status] ?? row.status, count(row.n), "tasks"]),
      ...side.spearman.map((row) => [
        `gradients against patches, ${row.site}`,
        `ρ ${number(row.rho.value)}`,
        `${range(row.rho, number)} · n ${row.rho.n}`,
      ]),
    ]),
    side.spans.length > 0 && patchingCurves(side.spans),
    side.heads.length > 0 &&
      attributionTable(
        "Heads at the decision",
        side.heads.map((row) => [`${row.layer}.${row.head}`, row.recovery]),
        ["recovered, interval for all heads together"],
      ),
    side.parts.length > 0 &&
      attributionTable(
        "Attention and MLP",
        side.parts.map((row) => [`${row.site} ${row.layer}, ${SOURCE[row.span] ?? row.span}`, row.recovery]),
        ["recovered"],
      ),
    sets.together &&
      attributionTable(
        ["Sets of heads chosen on one half of the tasks, on the other half", sizes]
          .filter(Boolean)
          .join(": "),
        [
          ["chosen", sets.together],
          ["random heads of the same layers", sets.random],
          ["difference", sets.net],
        ],
        ["recovered"],
      ),
    el(
      "p",
      { class: "caution" },
      "Shares of different spans or heads do not add up to 1: a later state holds what an earlier one gave it. A line marked “third prompt” is the control.",
    ),
  ].filter(Boolean);
}

/** The residual stream by layer, a line a span; a line named so is of a third prompt's states. */
function patchingCurves(spans) {
  const layers = spans.flatMap((line) => line.layers.map((at) => at.layer));
  const values = spans.flatMap((line) => line.layers.map((at) => at.recovery.value));
  return plot({
    title: "Residual stream, by layer",
    x: roundScale(layers),
    y: roundScale([0, 1, ...values]),
    xLabel: "layer",
    shape: "named",
    series: spans.map((line, index) => ({
      kind: line.control ? "random" : LINE_KINDS[index % 3],
      label: (SOURCE[line.span] ?? line.span) + (line.control ? ", third prompt" : ""),
      points: line.layers.map(({ layer, recovery }) => ({
        x: layer,
        y: recovery.value,
        low: recovery.low,
        high: recovery.high,
        say: `layer ${layer}: ${number(recovery.value)} ${range(recovery, number)}`,
      })),
    })),
  });
}
