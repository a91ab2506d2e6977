// Steering: a slider over the doses that were run, what each direction turns and costs, and the setting beside its control.

const DIRECTION = {
  mean_difference: "mean difference",
  unembedding: "row of the name",
  probe: "linear probe",
  random: "random (control)",
};
const TOWARDS = { drawn: "another tool", right: "the right tool" };

/** The run's card; null where nothing was steered. */
function steeringCard(card) {
  if (!card) return null;
  const state = {
    role: card.roles[0],
    layer: card.layers[card.layers.length - 1],
    dose: card.doses.length - 1,
  };
  const place = el("div", null);
  const told = el("output", null);
  const draw = () => {
    told.textContent = `dose ${number(card.doses[state.dose])}`;
    place.replaceChildren(doseTable(card, state), settingTable(card, state.role));
  };
  const slider = el("input", {
    type: "range",
    min: 0,
    max: card.doses.length - 1,
    step: 1,
    value: state.dose,
    "aria-label": "Dose, in mean lengths of a state",
    oninput: (event) => {
      state.dose = Number(event.target.value);
      draw();
    },
  });
  const choose = (key) => (value) => {
    state[key] = value;
    draw();
  };
  const roles = card.roles.map((role) => [role, TOWARDS[role] ?? role]);
  const layers = card.layers.map((layer) => [layer, `layer ${layer}`]);
  draw();
  return figure(
    "Can the choice be turned?",
    "A vector is added where the name begins, as many mean lengths of a state long as the dose says; the share of held-out tasks whose most probable whole name it turns, and what it does to unrelated text.",
    el(
      "div",
      { class: "controls" },
      roles.length > 1 && segmented("Towards", roles, state.role, choose("role")),
      layers.length > 1 && segmented("Behind", layers, state.layer, choose("layer")),
      el("label", null, slider, told),
    ),
    place,
    el(
      "p",
      { class: "caution" },
      card.lengths.length
        ? `A mean difference is ${card.lengths.map(([layer, value]) => `${number(value)} state lengths long in layer ${layer}`).join(", ")}. `
        : "No two tools were named often enough for a mean difference. ",
      "The slider shows numbers that were run; nothing is computed between them.",
    ),
  );
}

function doseTable({ grid, doses }, { role, layer, dose }) {
  const rows = grid.filter((cell) => cell.role === role && cell.layer === layer && cell.dose === doses[dose]);
  return el(
    "div",
    null,
    el("h4", null, "At this dose"),
    estimateTable(
      [
        ["direction", null],
        ["turned", "share of tasks"],
        ["log P", "change, nats"],
        ["P", "change"],
        ["KL elsewhere", "nats, unrelated text"],
      ],
      rows.map((cell) => [
        DIRECTION[cell.direction] ?? cell.direction,
        "",
        cell.steer_switch_rate,
        cell.steer_log_prob,
        cell.steer_probability,
        cell.steer_kl,
      ]),
    ),
  );
}

function settingTable({ settings }, role) {
  if (!settings.length)
    return el("p", { class: "caution" }, "No layer and dose is within the price on unrelated text.");
  return el(
    "div",
    null,
    el("h4", null, "Layer and dose chosen on the other half of the tasks"),
    estimateTable(
      [
        ["direction", null],
        ["turned", "held-out tasks"],
        ["random", "same length"],
        ["beyond random", ""],
        ["valid call", "of the turned"],
        ["valid before", ""],
        ["other tasks", "change of accuracy"],
        ["KL elsewhere", "nats"],
      ],
      settings.map((row) => [
        DIRECTION[row.direction] ?? row.direction,
        `layer ${row.layer}, dose ${number(row.dose)}`,
        row.steer_turned[role],
        row.steer_turned_random[role],
        row.steer_turned_minus_random[role],
        row.steer_valid_call[role],
        row.steer_valid_call_before[role],
        row.steer_other_accuracy,
        row.steer_kl,
      ]),
    ),
  );
}
