// One chain-of-thought task: the reasoning step by step, what each step reads, and the memory it leaves.

function cotDetail(task) {
  const question = task.pieces.filter(([label]) => label === "question").map(([, text]) => text).join(" ");
  return [
    question ? el("blockquote", null, question) : null,
    reasoningFigure(task),
    readFigure(task),
    promptFigure(task),
  ];
}

function shortLabel(label) {
  return label.replace(/^step:/, "");
}

function reasoningFigure(task) {
  const most = Math.max(1, ...task.steps.map((step) => step.bytes ?? 0), task.answer_bytes ?? 0);
  const row = (label, text, tokens, size, kind) => el("tr", { class: kind },
    el("th", { scope: "row" }, label), el("td", { class: "say" }, text),
    el("td", { class: "num" }, tokens), el("td", { class: "num" }, bytes(size)), el("td", { class: "memory" }, bar((size ?? 0) / most)));
  const rows = task.steps.map((step) => row(shortLabel(step.label), step.text, step.tokens, step.bytes, ""));
  const answer = task.answer === null
    ? el("em", null, "no answer was read")
    : [task.answer, " ", task.score === null ? null : verdict(task.score)];
  rows.push(row("answer", answer, task.answer_tokens || "–", task.answer_bytes, "answer"));
  const total = Object.values(task.memory).reduce((a, b) => a + b, 0);
  const head = ["step", "", "tokens", "KV memory", ""].map((text, index) => el("th", { class: index > 1 ? "num" : "" }, text));
  return figure("Reasoning",
    "Steps are sentences or lines. KV memory: bytes of keys and values that a step’s tokens leave for later ones, all layers together.",
    el("div", { class: "scroll" }, el("table", { class: "bars reasoning" }, el("thead", null, el("tr", null, head)), el("tbody", null, rows))),
    readings([
      ["target", task.target ?? "–"],
      ["whole KV memory", bytes(total), `${plural(task.n_prompt + task.n_new - 1, "position")}, the prompt included`],
      task.reconstruction_error !== null && ["memory check", number(task.reconstruction_error, 2), "largest relative error of the reads rebuilt from the saved memory"],
      task.answer_forced ? ["answer cue", "forced", "the model did not announce an answer by itself"] : null,
    ]));
}

const READS = {
  mass: ["mass", "probability mass", "attn_to_spans", "Row: a step. Column: what it reads, as the share of attention while its tokens are emitted. A row sums to 1."],
  norm: ["norm", "residual norm", "value_to_spans", "Row: a step. Column: the size of what is read from each source, ‖Σ α v W_O‖, a mean over heads. Attention to a source whose values are small weighs little here."],
};

function readFigure(task) {
  const title = "What each step reads";
  const there = Object.keys(READS).filter((name) => task.reads[name]);
  if (!there.length) return notCaptured(title, "attn_to_spans or value_to_spans, or no step was read");
  const state = { reading: there[0], layer: "mean" };
  const place = el("div", null);
  const how = el("p", { class: "how" });
  const draw = () => {
    how.textContent = READS[state.reading][3];
    place.replaceChildren(...readChart(task, task.reads[state.reading], state));
  };
  const first = task.reads[there[0]];
  const layers = [["mean", `mean of ${first.layers.length}`], ...(first.by_layer ? first.layers.map((layer, index) => [String(index), String(layer)]) : [])];
  const controls = el("div", { class: "controls" },
    segmented("What to show", there.map((name) => [name, READS[name][0]]), state.reading, (value) => { state.reading = value; draw(); }),
    dropdown("layer", layers, (value) => { state.layer = value; draw(); }),
    first.by_layer ? null : el("span", { class: "muted" }, "too long to embed by layer; `probe analyze` keeps every layer in measures.parquet"));
  draw();
  return el("figure", null,
    el("figcaption", null, el("h3", null, title), how), controls, place,
    el("p", { class: "caution" }, "Correlational: a source that is read much may matter little, and the other way round. bos, the attention sink, is left out of the color scale."));
}

function readChart(task, reads, state) {
  const [, unit] = READS[state.reading];
  const matrix = state.layer === "mean" ? reads.mean : reads.by_layer[Number(state.layer)];
  const where = state.layer === "mean" ? `mean of ${plural(reads.layers.length, "layer")}` : `layer ${reads.layers[Number(state.layer)]}`;
  const sink = (source) => source === "bos" || source === "sink";
  const colored = matrix.flatMap((row) => row.filter((value, index) => value !== null && !sink(reads.sources[index])));
  const max = Math.max(0, ...colored);
  const rows = matrix.map((values, index) => ({
    kind: "heat", label: label(reads.readers[index]), after: [reads.rows[index]],
    cells: values.map((value, column) => value === null ? null : {
      value: sink(reads.sources[column]) ? 0 : value, text: value.toFixed(2),
      say: `${label(reads.readers[index])} reads ${label(reads.sources[column])}: ${number(value, 4)} ${unit} (${where}, ${plural(reads.n_heads, "head")}, ${plural(reads.rows[index], "row")})`,
    }),
  }));
  const columns = reads.sources.map((source) => ({
    label: shortLabel(source), title: `${source}, ${task.tokens[source] ?? 0} tokens`, mark: sink(source) ? "sink" : "",
  }));
  return [
    heatmap({ columns, corner: "reads from →", groups: [rows], max, after: ["rows"], numbers: true }),
    legend(max, `${unit}, ${where}, mean of ${plural(reads.n_heads, "head")} and of the reader’s rows`, number),
  ];
}

function label(name) {
  return name.replace(/^step:/, "step ");
}
