// The computational cycle: choose a step, see what it reads, what hiding that changes, and the memory it leaves.

const QUANTITIES = {
  mass: {
    title: "mass",
    unit: "probability mass",
    how: "share of attention while the step’s tokens are emitted; a row sums to 1",
  },
  norm: {
    title: "norm",
    unit: "residual norm",
    how: "size of what is read, ‖Σ α v W_O‖: attention to small values weighs little here",
  },
  logit: {
    title: "logit",
    unit: "logits",
    how: "what each source adds to the logits of the emitted tokens, by direct attribution",
  },
  kl: {
    title: "knock-out",
    unit: "nats",
    how: "KL(base‖changed): how much the step’s tokens change when the source is hidden",
  },
};
const ABLATION = {
  total: ["total: hidden from all that follows", "no later position sees the source, in any layer"],
  direct: [
    "direct: hidden from the answer alone",
    "only the rows that emit the answer do not see the source",
  ],
  state_total: [
    "total, in the state: left out of recurrent layers",
    "behind the source the state of recurrent layers is what it was before; attention sees all",
  ],
  state_direct: [
    "direct, in the state: left out for the answer alone",
    "only the rows that emit the answer go on from a state without the source; attention sees all",
  ],
  both_total: [
    "total, in both memories",
    "no later position sees the source, and recurrent states are without it",
  ],
  both_direct: [
    "direct, in both memories",
    "only for the rows that emit the answer is the source hidden and left out of recurrent states",
  ],
  deleted: ["deleted from the text", "the source’s tokens are not there"],
};
/** @type {[string, string, (name: string) => boolean][]} kind, label, which names are of it */
const KINDS = [
  ["sink", "sink", (name) => isSink(name)],
  ["question", "question", (name) => /^(question|user)/.test(name)],
  ["example", "examples", (name) => name.startsWith("example")],
  ["tool", "tools", (name) => name.startsWith("tool:")],
  ["result", "results", (name) => name.startsWith("result:")],
  ["step", "earlier steps", (name) => name.startsWith("step:")],
  ["rest", "markup, system", () => true],
];
const LOG_RANGE = 1000; // the logarithmic scale's top over its bottom; what is smaller has the lowest color
const LISTED = 12; // sources of a step before the reader asks for all

function isSink(name) {
  return name === "bos" || name === "sink";
}

function kindOf(name) {
  return KINDS.find(([, , is]) => is(name))[0];
}

function stepName(name) {
  return name
    .replace(/^step:/, "step ")
    .replace(/^result:/, "result ")
    .replace(/^tool:/, "");
}

/** The numbers of a reasoning: float32 in base64, each reader's row as far as it goes. */
function cycleNumbers(cycle) {
  const starts = [0];
  for (const width of cycle.widths) starts.push(starts[starts.length - 1] + width);
  const total = starts[starts.length - 1];
  const decoded = new Map();
  const decode = (key, text) => {
    if (!decoded.has(key)) {
      const raw = atob(text),
        buffer = new Uint8Array(raw.length);
      for (let index = 0; index < raw.length; index++) buffer[index] = raw.charCodeAt(index);
      decoded.set(key, new Float32Array(buffer.buffer));
    }
    return decoded.get(key);
  };
  /** Mean over the layers of a band (`all`, a band's name, or the index of a layer). */
  const layered = (name, band) => {
    const key = `${name} ${band}`;
    if (decoded.has(key)) return decoded.get(key);
    const { by_layer, bands, layers, data } = cycle.reads[name];
    const whole = decode(name, data);
    const part = (index) => whole.subarray(index * total, (index + 1) * total);
    const named = bands.findIndex(([title]) => title === band);
    let measured;
    if (!by_layer) measured = part(named + 1);
    else if (/^\d+$/.test(band)) measured = part(Number(band));
    else {
      const [from, to] =
        band === "all"
          ? [0, layers.length]
          : [layers.indexOf(bands[named][1]), layers.indexOf(bands[named][2]) + 1];
      measured = new Float32Array(total);
      for (let layer = from; layer < to; layer++)
        part(layer).forEach((value, index) => {
          measured[index] += value / (to - from);
        });
    }
    decoded.set(key, measured);
    return measured;
  };
  const at = (values, row, column) => {
    if (!values || column >= cycle.widths[row]) return null;
    const value = values[starts[row] + column];
    return Number.isNaN(value) ? null : value;
  };
  /** The matrix of a quantity as a function of row and column: looked up once, not once a cell. */
  const grid = (quantity, state) => {
    const values =
      quantity === "kl" ? knockout(state.ablation) : cycle.reads[quantity] && layered(quantity, state.band);
    return (row, column) => at(values, row, column);
  };
  return {
    grid,
    of: (quantity, row, column, state) => grid(quantity, state)(row, column),
    control: (row, column, state) => at(knockout(`random_${state.ablation}`), row, column),
  };
  function knockout(name) {
    return cycle.knockouts[name] ? decode(`knockout ${name}`, cycle.knockouts[name].data) : null;
  }
}

/** The label of a step as the address names it: its number, or `answer`. */
function stepLabel(step) {
  return step === undefined || step === "answer" ? step : `step:${step}`;
}

let openCycle = null; // what the open task's figures share

address.listen((changed) => {
  if (!changed.includes("step") || !openCycle) return;
  openCycle.show(openCycle.cycle.readers.indexOf(stepLabel(address.state.step)));
});

/** Everything that the figures of a task share: its numbers, and the chosen step, quantity, band and ablation. */
function cycleOf(task) {
  const cycle = task.cycle;
  const ablations = Object.keys(cycle.knockouts).filter((name) => !name.startsWith("random_"));
  const quantities = [
    ...["mass", "norm", "logit"].filter((name) => cycle.reads[name]),
    ablations.length && "kl",
  ].filter(Boolean);
  const texts = new Map();
  for (const [name, text] of task.pieces) // a label may stand at several places of the prompt
    if (name) texts.set(name, texts.has(name) ? `${texts.get(name)} … ${text}` : text);
  for (const step of task.steps) texts.set(step.label, step.text);
  for (const turn of task.turns ?? [])
    if (turn.result) texts.set(`result:${turn.turn}`, turn.result.content ?? "");
  if (task.answer !== null) texts.set("answer", task.answer);
  const first = quantities.length ? cycle.readers.findIndex((_, row) => cycle.widths[row]) : 0;
  const wanted = cycle.readers.indexOf(stepLabel(address.state.step));
  const single = bandChoices(cycle)[1].find(([, text]) => text === address.state.layer);
  const state = {
    row: wanted >= 0 ? wanted : Math.max(0, first),
    quantity: quantities[0],
    band: single ? single[0] : "all",
    ablation: ablations[0],
    scale: "log",
    all: false,
  };
  return { task, cycle, numbers: cycleNumbers(cycle), quantities, ablations, texts, state, listeners: [] };
}

/** [all, bands and, where there, single layers] of the quantities that have layers. */
function bandChoices(cycle) {
  const some = ["mass", "norm", "logit"]
    .map((name) => cycle.reads[name])
    .find((measured) => measured && measured.layers[0] >= 0);
  if (!some) return [[], []];
  const named = some.bands.map(([name, from, to]) => [name, `${name} ${from}–${to}`]);
  return [
    [["all", `all ${some.layers.length}`], ...named],
    some.by_layer ? some.layers.map((layer, index) => [String(index), String(layer)]) : [],
  ];
}

function bandName(shared) {
  const { cycle, state } = shared;
  const some = Object.values(cycle.reads)[0];
  if (!some) return "";
  if (/^\d+$/.test(state.band)) return `layer ${some.layers[Number(state.band)]}`;
  const band = some.bands.find(([name]) => name === state.band);
  return band
    ? `${band[0]} layers ${band[1]} to ${band[2]}`
    : `mean of ${plural(some.layers.length, "layer")}`;
}

/** The figures, in order. */
function cycleFigures(task, about) {
  const shared = cycleOf(task);
  const { cycle, state, listeners } = shared;
  const figures = [
    stepsFigure(shared, about),
    readsFigure(shared),
    memoryFigure(shared),
    lensFigure(shared),
    curvesFigure(task),
  ];
  shared.show = (row) => {
    if (row < 0 || row >= cycle.readers.length || row === state.row) return;
    state.row = row;
    state.all = false;
    for (const listen of listeners) listen("row");
  };
  shared.choose = (row) => {
    const label = cycle.readers[row];
    shared.show(row);
    if (label !== undefined) address.typed({ step: label.replace(/^step:/, "") });
  };
  openCycle = shared;
  return figures;
}

// -- the steps and what one of them reads ------------------------------------------------------------------------

function stepsFigure(shared, about) {
  const { cycle, listeners } = shared;
  const panel = el("div", { class: "panel", "aria-live": "polite" });
  const list = stepList(shared);
  const draw = () => {
    list.shade();
    panel.replaceChildren(...panelParts(shared));
  };
  listeners.push(draw);
  draw();
  if (!cycle.readers.length)
    panel.replaceChildren(el("p", { class: "absent" }, "no steps in what was written"));
  return el(
    "figure",
    { class: "wide" },
    el(
      "figcaption",
      null,
      el("h3", null, "Reasoning"),
      el(
        "p",
        { class: "how" },
        "Choose a step: the strip beside each text is how much the step reads of it. ",
        el("kbd", null, "j"),
        " ",
        el("kbd", null, "k"),
        " or the arrow keys go from step to step while the list has the focus.",
      ),
    ),
    shared.quantities.length > 0 && cycleControls(shared),
    el("div", { class: "cycle" }, list.node, panel),
    about,
  );
}

/** Quantity, layers and ablation: for the list, the panel and the matrix alike. */
function cycleControls(shared) {
  const { state, listeners, quantities, ablations } = shared;
  const set = (name) => (value) => {
    state[name] = value;
    for (const listen of listeners) listen(name);
  };
  const [bandOptions, layers] = bandChoices(shared.cycle);
  const bandButtons =
    bandOptions.length > 1 &&
    segmented("Layers", bandOptions, state.band, (value) => {
      layerBox.value = "";
      set("band")(value);
    });
  const layerBox = el(
    "select",
    {
      "aria-label": "one layer",
      onchange: (event) => {
        for (const button of bandButtons ? bandButtons.children : [])
          button.setAttribute("aria-pressed", "false");
        if (!event.target.value) bandButtons?.children?.[0].setAttribute("aria-pressed", "true");
        set("band")(event.target.value || "all");
        address.set({ layer: layers.find(([value]) => value === event.target.value)?.[1] });
      },
    },
    el("option", { value: "" }, "–"),
    layers.map(([value, text]) => el("option", { value, selected: value === state.band }, text)),
  );
  return el(
    "div",
    { class: "controls" },
    quantities.length > 1 &&
      segmented(
        "Order and color by",
        quantities.map((name) => [name, QUANTITIES[name].title]),
        state.quantity,
        set("quantity"),
      ),
    bandButtons && el("span", { class: "with" }, "layers", bandButtons),
    layers.length > 1 && el("label", { class: "dropdown" }, "one layer ", layerBox),
    ablations.length > 1 &&
      dropdown(
        "knock-out",
        ablations.map((name) => [name, ABLATION[name]?.[0] ?? name]),
        set("ablation"),
      ),
  );
}

/** Everything that can be read, in order; the steps and the answer can be chosen. */
function stepList(shared) {
  const { task, cycle, numbers, state, texts } = shared;
  const places = new Map(cycle.readers.map((name, row) => [name, row]));
  const told = cycle.sources.filter(
    (name) => places.has(name) || (texts.get(name) && !isSink(name) && name !== "other"),
  );
  const sizes = new Map(task.steps.map((step) => [step.label, step.bytes]));
  const items = told.map((name) => {
    const row = places.get(name);
    const reader = row !== undefined;
    const verdictOf =
      name === "answer" && task.score !== null && task.score !== undefined ? verdict(task.score) : null;
    const size = sizes.get(name) ?? (name === "answer" ? task.answer_bytes : undefined);
    const node = el(
      "li",
      {
        role: "option",
        id: reader ? `reader-${row}` : null,
        class: reader ? `reader ${name === "answer" ? "answer" : ""}` : "prompt",
        "aria-disabled": reader ? null : "true",
        "aria-selected": reader ? "false" : null,
        onclick: reader ? () => shared.choose(row) : null,
      },
      el("i", { class: "strip" }),
      el("b", null, name.startsWith("step:") ? name.slice(5) : stepName(name)),
      el("span", { class: "say" }, texts.get(name) ?? "–", " ", verdictOf),
      el(
        "small",
        { title: "tokens, and bytes of keys and values that they leave" },
        `${task.tokens[name] ?? 0} tok`,
        size ? [el("br"), bytes(size)] : null,
      ),
    );
    return { node, name, row, column: cycle.sources.indexOf(name) };
  });
  const node = el(
    "ol",
    { class: "steps", role: "listbox", tabindex: 0, "aria-label": "Steps of the reasoning" },
    items.map((item) => item.node),
  );
  node.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const last = cycle.readers.length - 1;
    const to = {
      j: state.row + 1,
      ArrowDown: state.row + 1,
      k: state.row - 1,
      ArrowUp: state.row - 1,
      Home: 0,
      End: last,
      PageDown: Math.min(last, state.row + 10),
      PageUp: Math.max(0, state.row - 10),
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    shared.choose(to);
  });
  let before = null;
  const shade = () => {
    const read = state.quantity ? numbers.grid(state.quantity, state) : () => null;
    const values = items.map((item) => read(state.row, item.column));
    const max = Math.max(0, ...values.map((value) => Math.abs(value ?? 0)));
    items.forEach((item, index) => {
      const share = values[index] !== null && max > 0 ? Math.abs(values[index]) / max : 0;
      item.node.style.setProperty("--share", share);
    });
    const now = items.find((item) => item.row === state.row);
    if (!now || now === before) return;
    before?.node.setAttribute("aria-selected", "false");
    now.node.setAttribute("aria-selected", "true");
    node.setAttribute("aria-activedescendant", now.node.id);
    if (before) showItem(node, now.node);
    before = now;
  };
  return { node, shade };
}

function panelParts(shared) {
  const { cycle, state, quantities } = shared;
  const name = cycle.readers[state.row];
  if (name === undefined) return [];
  const title = el("h4", null, `What ${name === "answer" ? "the answer" : stepName(name)} reads`);
  if (!quantities.length)
    return [
      title,
      el("p", { class: "absent" }, "not captured: this run did not keep attn_to_spans or value_to_spans"),
    ];
  if (!cycle.widths[state.row])
    return [title, el("p", { class: "absent" }, "none of its rows were captured")];
  const rows = sourceRows(shared);
  return [
    title,
    cycle.reads.mass && splitBars(shared),
    sourceTable(shared, rows),
    stepReadings(shared, name),
  ].filter(Boolean);
}

/** Sources of the chosen step with everything known of each, most read first. */
function sourceRows(shared) {
  const { cycle, numbers, state, quantities } = shared;
  const rows = [];
  const reads = quantities.map((quantity) => [quantity, numbers.grid(quantity, state)]);
  for (let column = 0; column < cycle.widths[state.row]; column++) {
    const row = { name: cycle.sources[column], column, control: numbers.control(state.row, column, state) };
    for (const [quantity, read] of reads) row[quantity] = read(state.row, column);
    if (quantities.some((quantity) => row[quantity] !== null)) rows.push(row);
  }
  const size = (row) => Math.abs(row[state.quantity] ?? -1);
  return rows.sort((a, b) => size(b) - size(a));
}

/** Where the attention of the chosen step goes, band of layers by band. */
function splitBars(shared) {
  const { cycle, numbers, state } = shared;
  const self = cycle.readers[state.row];
  const bandsThere = [
    ["all", "all layers"],
    ...cycle.reads.mass.bands.map(([name, from, to]) => [name, `${name} ${from}–${to}`]),
  ];
  const shown = new Set();
  const lines = bandsThere.map(([band, title]) => {
    const sums = {};
    const read = numbers.grid("mass", { ...state, band });
    for (let column = 0; column < cycle.widths[state.row]; column++) {
      const value = read(state.row, column);
      const name = cycle.sources[column];
      const kind = name === self ? "self" : kindOf(name);
      if (value !== null) sums[kind] = (sums[kind] ?? 0) + value;
    }
    const kinds = [...KINDS.map(([kind, words]) => [kind, words]), ["self", "itself"]].filter(
      ([kind]) => sums[kind] !== undefined,
    );
    for (const [kind] of kinds) shown.add(kind);
    const parts = kinds.map(([kind, words]) =>
      el(
        "i",
        { class: kind, "--share": sums[kind], title: `${words}: ${number(sums[kind], 4)}` },
        sums[kind] > 0.09 ? percent(sums[kind]).replace("\u00a0", "") : "",
      ),
    );
    return el(
      "tr",
      { class: band === state.band ? "now" : "" },
      el("th", { scope: "row" }, title),
      el("td", null, el("div", { class: "split" }, parts)),
    );
  });
  const keys = [...KINDS.map(([kind, words]) => [kind, words]), ["self", "itself"]].filter(([kind]) =>
    shown.has(kind),
  );
  return el(
    "div",
    { class: "splits" },
    el("table", null, el("tbody", null, lines)),
    el(
      "p",
      { class: "key" },
      "attention to ",
      keys.map(([kind, words]) => el("span", null, el("i", { class: kind }), words)),
    ),
  );
}

function sourceTable(shared, rows) {
  const { task, cycle, state, quantities } = shared;
  const max = {};
  for (const quantity of quantities)
    max[quantity] = Math.max(
      1e-12,
      ...rows
        .filter((row) => quantity === "kl" || !isSink(row.name))
        .map((row) => Math.abs(row[quantity] ?? 0)),
      quantity === "kl" ? Math.max(0, ...rows.map((row) => row.control ?? 0)) : 0,
    );
  const n = cycle.rows?.[state.row];
  const range = cycle.knockouts[state.ablation]?.n[state.row];
  const note = {
    kl: range
      ? `nats · n ${range[0] === range[1] ? plural(range[0], "row") : `${range[0]} to ${range[1]} rows`}`
      : "nats",
  };
  for (const name of ["mass", "norm", "logit"])
    note[name] = `${QUANTITIES[name].unit}${n ? ` · n ${plural(n, "row")}` : ""}`;
  const hasControl = cycle.knockouts[`random_${state.ablation}`];
  const head = el(
    "tr",
    null,
    el("th", null, "source"),
    el("th", { class: "num" }, "tokens"),
    quantities.map((quantity) =>
      el(
        "th",
        { title: QUANTITIES[quantity].how, class: quantity === state.quantity ? "now" : "" },
        QUANTITIES[quantity].title,
        el("small", null, note[quantity]),
        quantity === "kl" && hasControl && el("small", null, "below: random span of equal size"),
      ),
    ),
  );
  const shown = state.all ? rows : rows.slice(0, LISTED);
  const left = rows.slice(shown.length);
  const body = shown.map((row) =>
    el(
      "tr",
      { class: isSink(row.name) ? "sink" : "" },
      el(
        "th",
        { scope: "row", title: shared.texts.get(row.name) ?? row.name },
        el("i", { class: `chip ${row.name === cycle.readers[state.row] ? "self" : kindOf(row.name)}` }),
        stepName(row.name),
        row.name === cycle.readers[state.row] && el("small", null, " itself"),
        isSink(row.name) && el("small", null, " attention sink"),
      ),
      el("td", { class: "num" }, task.tokens[row.name] ?? "–"),
      quantities.map((quantity) => quantityCell(row, quantity, max[quantity])),
    ),
  );
  const more =
    left.length > 0 &&
    el(
      "button",
      {
        type: "button",
        class: "more",
        onclick: () => {
          state.all = true;
          for (const listen of shared.listeners) listen("all");
        },
      },
      `show ${left.length} more${cycle.reads.mass ? `, together mass ${number(left.reduce((sum, row) => sum + (row.mass ?? 0), 0))}` : ""}`,
    );
  return el(
    "div",
    null,
    scrollBox(el("table", { class: "sources" }, el("thead", null, head), el("tbody", null, body))),
    more,
  );
}

function quantityCell(row, quantity, max) {
  const value = row[quantity];
  if (value === null || value === undefined) return el("td", { class: "none" }, "–");
  const over = Math.abs(value) > max * 1.0001;
  const line = quantity === "logit" ? signedBar(value / max) : bar(Math.abs(value) / max, over ? "over" : "");
  const control = quantity === "kl" &&
    row.control !== null && [bar(row.control / max, "control"), el("small", null, number(row.control))];
  return el(
    "td",
    { title: `${number(value, 4)} ${QUANTITIES[quantity].unit}` },
    el("div", { class: "amount" }, line, el("span", null, number(value)), control),
  );
}

/** What is known of the chosen step as a source: how long it is in use, and what taking it away does to the answer. */
function stepReadings(shared, name) {
  const { task, cycle, state } = shared;
  const life = cycle.lifetimes[name];
  const effect = cycle.answer.answer_odds_change?.[state.ablation]?.[name];
  const control = cycle.answer.answer_odds_change?.[`random_${state.ablation}`]?.[name];
  const [written] = cycle.memory[state.row];
  const bounds = (measured) =>
    measured.low === null ? "" : ` (95 % ${interval(measured.low, measured.high)})`;
  return el(
    "div",
    null,
    name !== "answer" &&
      (life || effect) &&
      el("h4", null, `${stepName(name).replace("s", "S")} as a source`),
    readings([
      ["memory written", bytes(written), `${plural(task.tokens[name] ?? 0, "token")}`],
      life && [
        "in use for",
        plural(life[0], "step"),
        `last read with more than ${percent(cycle.in_use)} of attention; ${plural(life[1], "later reader")}`,
      ],
      effect && [
        "answer’s log-odds without it",
        change(effect.value),
        `nats${bounds(effect)}, ${state.ablation}${control ? `; random span ${change(control.value)}` : ""}`,
      ],
      cycle.norms.value_norm[name] !== undefined && [
        "norm of keys, values",
        `${number(cycle.norms.key_norm[name])}, ${number(cycle.norms.value_norm[name])}`,
        "mean of layers, heads and positions",
      ],
    ]),
  );
}

// -- step × step -----------------------------------------------------------------------------------------------------

function readsFigure(shared) {
  const { cycle, numbers, quantities, state, listeners } = shared;
  const title = "What each step reads";
  if (!quantities.length || !cycle.readers.length)
    return notCaptured(title, "attn_to_spans or value_to_spans, or no step was read");
  const how = el("p", { class: "how" });
  const key = el("div", null);
  const sinks = cycle.sources.map(isSink);
  let max = 1,
    value = null;
  const measureUp = () => {
    max = 1e-12;
    value = numbers.grid(state.quantity, state);
    for (let row = 0; row < cycle.readers.length; row++)
      for (let column = 0; column < cycle.widths[row]; column++) {
        const measured = value(row, column);
        if (measured !== null && !sinks[column]) max = Math.max(max, Math.abs(measured));
      }
    const { unit, how: words } = QUANTITIES[state.quantity];
    const what =
      state.quantity === "kl" ? (ABLATION[state.ablation]?.[1] ?? state.ablation) : bandName(shared);
    how.textContent = `Row: a step. Column: what it reads. ${words[0].toUpperCase()}${words.slice(1)} (${what}).`;
    const log = state.scale === "log";
    key.replaceChildren(
      legend(
        max,
        `${unit}, ${what}, ${log ? "logarithmic scale" : "linear scale"}; a cut corner is beyond the scale, which leaves out the attention sink`,
        number,
        log ? max / LOG_RANGE : 0,
      ),
    );
  };
  measureUp();
  const columns = cycle.sources.map((name) =>
    name.startsWith("step:")
      ? { label: name, short: name.slice(5), place: Number(name.slice(5)) }
      : { label: stepName(name), short: "" },
  );
  const picture = matrix({
    label: "Step by step matrix of reads; arrow keys read out cells",
    corner: "reads from →",
    columns,
    rows: cycle.readers.map((name) => ({
      label: stepName(name),
      place: name.startsWith("step:") ? Number(name.slice(5)) : 0,
    })),
    share: (row, column) => {
      const measured = value(row, column);
      if (measured === null) return null;
      if (state.scale !== "log") return Math.max(-1, Math.min(1, measured / max));
      const size = Math.log((Math.abs(measured) * LOG_RANGE) / max) / Math.log(LOG_RANGE);
      return Math.sign(measured) * Math.max(0, Math.min(1, size));
    },
    raw: (row, column) => value(row, column),
    over: (row, column) => Math.abs(value(row, column) ?? 0) > max * 1.0001,
    text: (row, column) => number(value(row, column), 2),
    say: (row, column) => sayRead(shared, row, column),
    chosen: () => ({ row: state.row, column: -1 }),
    choose: (row) => shared.choose(row),
  });
  listeners.push((what) => {
    if (what === "row") picture.repaint();
    else if (what !== "all") {
      measureUp();
      picture.changed();
    }
  });
  return el(
    "figure",
    null,
    el("figcaption", null, el("h3", null, title), how),
    el(
      "div",
      { class: "controls" },
      segmented(
        "Scale",
        [
          ["log", "logarithmic"],
          ["linear", "linear"],
        ],
        state.scale,
        (scale) => {
          state.scale = scale;
          measureUp();
          picture.changed();
        },
      ),
    ),
    picture.node,
    key,
    el(
      "p",
      { class: "caution" },
      "Reads are correlational: a source that is read much may matter little, and the other way round. A knock-out is proof, as far as it exceeds that of a random span.",
    ),
  );
}

function sayRead(shared, row, column) {
  const { task, cycle, numbers, quantities, state } = shared;
  const measured = quantities
    .map((quantity) => {
      const value = numbers.of(quantity, row, column, state);
      if (value === null) return null;
      const control = quantity === "kl" ? numbers.control(row, column, state) : null;
      return `${QUANTITIES[quantity].title} ${number(value, 4)} ${QUANTITIES[quantity].unit}${control === null ? "" : ` (random span ${number(control, 4)})`}`;
    })
    .filter(Boolean);
  const source = cycle.sources[column];
  return `${stepName(cycle.readers[row])} ← ${stepName(source)} (${plural(task.tokens[source] ?? 0, "token")}): ${measured.join(" · ") || "nothing to read"}`;
}

// -- memory, answer, faithfulness -----------------------------------------------------------------------------------

function memoryFigure(shared) {
  const { cycle, state, listeners } = shared;
  const column = (index) => cycle.memory.map((entry) => entry[index]);
  if (!cycle.readers.length || column(0).every((value) => value === null)) return null;
  const life = cycle.readers.map((name) => cycle.lifetimes[name]?.[0] ?? null);
  const norms = (name) => cycle.readers.map((reader) => cycle.norms[name][reader] ?? null);
  const rows = [
    {
      title: "written: bytes of keys and values that the step leaves",
      show: bytes,
      bars: [{ values: column(0), kind: "bar" }],
    },
    {
      title: `read: bytes of sources with more than ${percent(cycle.in_use)} of its attention, before all that it could read`,
      show: bytes,
      bars: [
        { values: cycle.memory.map(([written, held]) => held + (written ?? 0)), kind: "neutral" },
        { values: column(2), kind: "bar" },
      ],
    },
    life.some((value) => value !== null) && {
      title: "in use: steps until it is read for the last time",
      show: number,
      bars: [{ values: life, kind: "bar" }],
    },
    Object.keys(cycle.norms.key_norm).length > 0 && {
      title: "mean norm of keys",
      show: number,
      bars: [{ values: norms("key_norm"), kind: "bar" }],
    },
    Object.keys(cycle.norms.value_norm).length > 0 && {
      title: "mean norm of values",
      show: number,
      bars: [{ values: norms("value_norm"), kind: "bar" }],
    },
  ].filter(Boolean);
  const say = (row) => {
    const [written, held, used] = cycle.memory[row];
    return [
      `${stepName(cycle.readers[row])}: ${bytes(written)} written`,
      `${bytes(held)} in front of it`,
      used !== null && `${bytes(used)} read`,
      life[row] !== null && `in use for ${plural(life[row], "step")}`,
    ]
      .filter(Boolean)
      .join(" · ");
  };
  const picture = tracks({
    label: "Memory by step",
    places: cycle.readers.map((name) => (name === "answer" ? "ans." : name.slice(5))),
    rows,
    say,
    chosen: () => state.row,
    choose: (row) => shared.choose(row),
  });
  listeners.push((what) => {
    if (what === "row") picture.repaint();
  });
  return figure(
    "Memory over the steps",
    "Keys and values, all layers together: what each step adds to them, and how much of them it uses. They are never rewritten.",
    picture.node,
  );
}

function lensFigure(shared) {
  const { cycle, state, listeners } = shared;
  if (!cycle.lens) return null;
  const { layers, readers, values } = cycle.lens;
  const drawn = [...layers.keys()].reverse(); // the last layer on top
  const present = values.flat().filter((value) => typeof value === "number");
  const low = Math.min(...present),
    high = Math.max(...present);
  const at = (row, column) => values[drawn[row]][column];
  const picture = matrix({
    label: "Log-probability of the answer by layer and step; arrow keys read out cells",
    corner: "layer",
    rows: drawn.map((index) => ({ label: String(layers[index]), place: index })),
    columns: readers.map((name) =>
      name.startsWith("step:")
        ? { label: name.slice(5), short: name.slice(5), place: Number(name.slice(5)) }
        : { label: "ans.", short: "ans.", place: 0 },
    ),
    share: (row, column) =>
      at(row, column) === null ? null : high > low ? (at(row, column) - low) / (high - low) : 1,
    raw: at,
    text: (row, column) => at(row, column).toFixed(1).replace("-", "−"),
    say: (row, column) =>
      `layer ${layers[drawn[row]]}, ${stepName(readers[column])}: log P of the answer’s first token ${number(at(row, column), 4)} nats, P ${at(row, column) === null ? "–" : probability(Math.exp(at(row, column)))}`,
    chosen: () => ({ row: -1, column: readers.indexOf(cycle.readers[state.row]) }),
    choose: (_, column) => shared.choose(cycle.readers.indexOf(readers[column])),
  });
  listeners.push((what) => {
    if (what === "row") picture.repaint();
  });
  return figure(
    "The answer, layer by layer and step by step",
    "Logit lens: log-probability of the answer’s first token, read from the residual stream of each layer at each step.",
    picture.node,
    el(
      "div",
      { class: "legend" },
      el("span", null, number(low)),
      el("i", null),
      el("span", null, number(high)),
      el("span", { class: "unit" }, "nats"),
    ),
  );
}

const TESTS = {
  early_answer: "early answer",
  filler: "filler",
  mistake: "mistake",
  paraphrase: "paraphrase",
};
const CURVE_LABEL = {
  early_answer: "steps kept before the answer",
  mistake: "step made wrong",
  paraphrase: "steps paraphrased",
  filler: "",
};

function curvesFigure(task) {
  const curves = task.cycle.curves;
  const names = Object.keys(curves).filter((name) => curves[name].points.some(([step]) => step !== null));
  const filler = curves.filler?.points[0];
  if (!names.length && !filler) return null;
  const parts = names
    .flatMap((name) => {
      const points = curves[name].points.filter(([step]) => step !== null);
      const steps = points.map(([step]) => step);
      const x = scaleFrom(Math.min(...steps), Math.max(...steps), {
        ticks: [...new Set([Math.min(...steps), Math.max(...steps)])],
        show: String,
      });
      const logs = points.filter((point) => typeof point[1] === "number");
      const levels =
        name === "early_answer" && typeof filler?.[1] === "number"
          ? [{ y: filler[1], label: `filler in place of the steps: ${number(filler[1])} nats` }]
          : [];
      const same = points.filter((point) => typeof point[2] === "number");
      return [
        logs.length > 0 &&
          plot({
            title: `${TESTS[name]}: log P of the answer`,
            x,
            y: roundScale([...logs.map((point) => point[1]), ...levels.map((level) => level.y)]),
            xLabel: `${CURVE_LABEL[name]}, nats${levels.length ? "; dashed: filler" : ""}`,
            levels,
            series: [
              {
                kind: "",
                points: logs.map(([step, y]) => ({ x: step, y, say: `${step}: ${number(y)} nats` })),
              },
            ],
          }),
        same.length > 0 &&
          plot({
            title: `${TESTS[name]}: is the answer still the same?`,
            x,
            y: scaleFrom(0, 1, { ticks: [0, 1], show: (value) => (value ? "same" : "other") }),
            xLabel: CURVE_LABEL[name],
            series: [
              {
                kind: "",
                points: same.map(([step, , y, right]) => ({
                  x: step,
                  y,
                  say: `${step}: ${y ? "the same answer" : "another answer"}${right === undefined || right === null ? "" : right ? ", right" : ", wrong"}`,
                })),
              },
            ],
          }),
      ];
    })
    .filter(Boolean);
  return figure(
    "Does the answer follow from the steps?",
    "Lanham et al. 2023: the reasoning is cut short, filled or made wrong. An answer that stays the same does not depend on what was written.",
    el("div", { class: "plots" }, parts),
    readings([
      ...names.map(
        (name) =>
          curves[name].area && [
            `${TESTS[name]}: area over the curve`,
            number(curves[name].area.value),
            `share, n ${plural(curves[name].area.n, "point")}; 0: the answer never changes`,
          ],
      ),
      filler && [
        "filler",
        filler[2] === undefined || filler[2] === null
          ? `${number(filler[1])} nats`
          : filler[2]
            ? "the same answer"
            : "another answer",
        typeof filler[1] === "number" ? `log P ${number(filler[1])} nats` : null,
      ],
    ]),
  );
}

// -- over the tasks of the run -----------------------------------------------------------------------------------------

const CORRELATE = {
  read_mass: "attention mass",
  read_norm: "norm of what is read",
  read_rate: "mass per token",
  read_logit: "logit of what is read",
  span_tokens: "length of the source",
  recency: "how near it is",
};

/** The run's card: reads against proof, and whether answers follow from reasoning. */
function reasoningCard(measured) {
  if (!measured) return null;
  const proofs = [...new Set(measured.correlates.map((row) => row.proof))];
  const place = el("div", null);
  const draw = (proof) =>
    place.replaceChildren(proofTable(measured.correlates.filter((row) => row.proof === proof)));
  if (proofs.length) draw(proofs[0]);
  return figure(
    "Reasoning: reads against proof",
    "What a step reads is where it looks. A knock-out hides a step and measures what changes: only that is proof, as far as it exceeds a random span of equal size.",
    proofs.length > 1 &&
      el(
        "div",
        { class: "controls" },
        segmented(
          "Knock-out",
          proofs.map((name) => [name, name]),
          proofs[0],
          draw,
        ),
      ),
    el(
      "div",
      { class: "columns" },
      el("div", null, place),
      el("div", null, measured.changes.length > 0 && changeTable(measured.changes)),
    ),
    measured.faithful.length > 0 && faithfulPlots(measured.faithful),
  );
}

function proofTable(rows) {
  const cells = (pair) => [
    rangeTrack(pair, -1, 1),
    el(
      "td",
      { class: "num" },
      pair
        ? [
            pair.value.toFixed(2).replace("-", "−"),
            pair.low !== null &&
              el(
                "small",
                null,
                ` ${interval(pair.low, pair.high, (value) => value.toFixed(2).replace("-", "−"))}`,
              ),
          ]
        : "–",
    ),
  ];
  const n = Math.max(...rows.flatMap((row) => [row.pooled?.n ?? 0, row.within?.n ?? 0]));
  return el(
    "div",
    null,
    el("h4", null, "Spearman’s ρ with KL of the knock-out"),
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
            ["", "within each task", "", "over all pairs", ""].map((text, index) =>
              headCell(text, index % 2 ? "" : "num"),
            ),
          ),
        ),
        el(
          "tbody",
          null,
          rows.map((row) =>
            el(
              "tr",
              null,
              el("th", { scope: "row" }, CORRELATE[row.read] ?? row.read),
              cells(row.within),
              cells(row.pooled),
            ),
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
    el("p", { class: "caution" }, `${n} pairs of reader and source; 95 % intervals over resampled tasks.`),
  );
}

function changeTable(changes) {
  const rows = changes.map((row) => ({
    title: row.experiment,
    effect: row.answer_odds_change ?? row.answer_change,
    control: row.answer_odds_change_random ?? row.answer_change_random,
  }));
  const [min, max] = scaleOf(rows.flatMap((row) => [row.effect, row.control]));
  const line = (title, measured, kind) =>
    measured &&
    el(
      "tr",
      { class: kind },
      el("th", { scope: "row" }, title),
      rangeTrack(measured, min, max, kind),
      el("td", { class: "num" }, estimate(measured, nats)),
    );
  return [
    el("h4", null, "A step taken away: change in the answer’s log-odds, nats"),
    scrollBox(
      el(
        "table",
        { class: "why" },
        el(
          "tbody",
          null,
          rows
            .flatMap((row) => [line(row.title, row.effect, ""), line("random span", row.control, "control")])
            .filter(Boolean),
          el("tr", null, el("td", null), el("td", null, scaleEnds(min, max, nats)), el("td", null)),
        ),
      ),
    ),
    el(
      "p",
      { class: "caution" },
      `Means over the steps of a task, then over ${plural(Math.max(...rows.map((row) => row.effect?.n ?? 0)), "task")}, 95 % intervals.`,
    ),
  ];
}

function faithfulPlots(tests) {
  const curves = tests
    .filter((test) => test.points.length > 1)
    .map((test) =>
      plot({
        title: TESTS[test.test],
        x: SHARE(),
        y: SHARE(),
        xLabel:
          test.test === "mistake"
            ? "share of the steps before the mistake → same answer"
            : "share of the steps → same answer",
        shape: "square",
        series: [
          {
            kind: "",
            points: test.points.map(([x, y, low, high, n]) => ({
              x,
              y,
              low,
              high,
              say: `${percent(x)} of the steps: ${percent(y)} same answers (95 % ${interval(low, high, percent)}), n ${n}`,
            })),
          },
        ],
      }),
    );
  return el(
    "div",
    null,
    el("h4", null, "Share of tasks whose answer stays the same (Lanham et al. 2023)"),
    el("div", { class: "plots" }, curves),
    estimateTable(
      [
        ["test"],
        ["area over the curve", "share; 0: the answer never changes"],
        ["same answer", "share of tasks"],
        ["right answer", "share of tasks"],
      ],
      tests.map((test) => [
        TESTS[test.test],
        plural(test.n_tasks, "task"),
        test.area,
        [test.same, percent],
        [test.score, percent],
      ]),
    ),
    numbersOf(
      "numbers",
      ["test", "share of steps", "same answer", "95 % interval", "tasks"],
      tests.flatMap((test) =>
        test.points.map(([x, y, low, high, n]) => [
          TESTS[test.test],
          percent(x),
          percent(y),
          interval(low, high, percent),
          n,
        ]),
      ),
    ),
  );
}
