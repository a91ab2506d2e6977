// Runs side by side: what differs beyond chance first, then the tasks that turned, the runs themselves, and where they part inside.

const compared = PAGE.compared;
const ROWS = 60; // differences drawn before the reader asks for all

function rangeOf(row) {
  return interval(row.low, row.high);
}

/** Counts as one number, or as the least and the most of them. */
function spread(counts) {
  const [least, most] = [Math.min(...counts), Math.max(...counts)];
  return least === most ? count(least) : `${count(least)} to ${count(most)}`;
}

function differenceFigure(run, rows) {
  const clear = rows.filter((row) => row.clear).length;
  const place = el("div", null);
  const state = { words: "", all: false };
  const draw = () => {
    const words = state.words.toLowerCase().split(/\s+/).filter(Boolean);
    const kept = rows.filter((row) => {
      const text = [row.analyzer, row.name, row.at, row.tools].filter(Boolean).join(" ").toLowerCase();
      return words.every((word) => text.includes(word));
    });
    const shown = state.all || words.length ? kept : kept.filter((row, index) => row.clear && index < ROWS);
    place.replaceChildren(
      shown.length
        ? plainTable(
            [
              "measure",
              "where",
              "beyond chance",
              PAGE.runs[0],
              run,
              "difference",
              "95 % interval",
              "p corrected",
              "n",
              "unit",
            ],
            shown.map((row) => [
              `${row.analyzer} ${row.name}`,
              [row.at, row.tools].filter(Boolean).join(" "),
              row.clear ? el("b", null, row.difference > 0 ? "▲ more" : "▼ less") : "–",
              number(row.base),
              number(row.value),
              change(row.difference),
              rangeOf(row),
              number(row.p_corrected, 2),
              count(row.n),
              row.unit,
            ]),
            3,
          )
        : el(
            "p",
            { class: "null" },
            words.length ? "No measure matches." : "No difference found beyond chance.",
          ),
    );
  };
  const all = el(
    "button",
    {
      type: "button",
      class: "more",
      "aria-pressed": "false",
      onclick: () => {
        state.all = !state.all;
        all.setAttribute("aria-pressed", String(state.all));
        all.textContent = state.all ? "only those beyond chance" : `show all ${rows.length}`;
        draw();
      },
    },
    `show all ${rows.length}`,
  );
  draw();
  return figure(
    `${run} − ${PAGE.runs[0]}`,
    `${clear} of ${plural(rows.length, "measure")} differ beyond chance. A measure is averaged within each task, then paired by task; n counts tasks.`,
    el(
      "div",
      { class: "controls" },
      el("input", {
        type: "search",
        "aria-label": `Search measures of ${run}`,
        placeholder: "search measures",
        oninput: (event) => {
          state.words = event.target.value;
          draw();
        },
      }),
    ),
    place,
    rows.length > Math.min(clear, ROWS) && all,
  );
}

function flipFigure(run, rows) {
  const right = rows.filter((row) => row.turned === "right").length;
  return figure(
    `Tasks that turned, ${run}`,
    `${right} turned right, ${rows.length - right} wrong.`,
    plainTable(
      ["task", "turned", `chosen by ${PAGE.runs[0]}`, `chosen by ${run}`, "P before", "P after"],
      rows.map((row) => [
        row.task_id,
        verdict(row.turned === "right" ? 1 : 0),
        row.base_choice ?? "–",
        row.choice ?? "–",
        probability(row.base_probability),
        probability(row.probability),
      ]),
      4,
    ),
  );
}

function boardFigure(kind, rows) {
  const names = [...new Set(rows.map((row) => row.measure))];
  return figure(
    `The runs: ${kind}`,
    "Means over tasks with their intervals.",
    estimateTable(
      [["run"], ...names.map((name) => [name, rows.find((row) => row.measure === name).unit])],
      PAGE.runs
        .filter((run) => rows.some((row) => row.run === run))
        .map((run) => {
          const ofRun = rows.filter((row) => row.run === run);
          const failed = ofRun[0].n_failed ? `, ${ofRun[0].n_failed} failed` : "";
          return [
            run,
            `${ofRun[0].model}${failed}`,
            ...names.map((name) => ofRun.find((row) => row.measure === name)),
          ];
        }),
    ),
  );
}

function layerFigure(run, rows) {
  const numberOf = byLabel(
    rows.map((row) => ({ ...row, number: [row.name, row.at, row.tools].filter(Boolean).join(" ") })),
    "number",
  );
  return figure(
    `Layer by layer, ${run}`,
    `Differences from ${PAGE.runs[0]}; of states the distance. Bands are 95 % intervals over tasks.`,
    el(
      "div",
      { class: "plots" },
      numberOf.map(([name, ofName]) => {
        const [{ unit }] = ofName;
        const points = [...ofName]
          .sort((a, b) => a.layer - b.layer)
          .map(({ layer, difference, low, high, n }) => ({
            x: layer,
            y: difference,
            low,
            high,
            say: `layer ${layer}: ${change(difference)} ${unit} (${within(low, high)}), n ${n}`,
          }));
        if (points.length < 2) return null;
        return plot({
          title: [name, el("small", null, ` ${unit} · n ${spread(ofName.map((row) => row.n))}`)],
          x: roundScale(points.map((point) => point.x)),
          y: roundScale([0, ...points.flatMap(({ y, low, high }) => [y, low, high])]),
          xLabel: "layer",
          series: [{ kind: "", points }],
        });
      }),
    ),
    numbersOf(
      `numbers (${plural(rows.length, "row")})`,
      ["measure", "layer", "difference", "95 % interval", "n", "unit"],
      numberOf.flatMap(([name, ofName]) =>
        ofName.map((row) => [name, row.layer, change(row.difference), rangeOf(row), count(row.n), row.unit]),
      ),
    ),
  );
}

function strataFigure(rows) {
  return figure(
    "Parts of each run",
    "Scores by label, and the difference from the first label.",
    plainTable(
      ["run", "kind", "label", "score", "95 % interval", "n", "from the first", "95 % interval", "p"],
      rows.map((row) => [
        row.run,
        row.kind,
        row.label,
        number(row.score),
        rangeOf(row),
        count(row.n),
        change(row.difference),
        interval(row.difference_low, row.difference_high),
        number(row.p, 2),
      ]),
      3,
    ),
  );
}

function byLabel(rows, key) {
  return [...new Set(rows.map((row) => row[key]))].map((label) => [
    label,
    rows.filter((row) => row[key] === label),
  ]);
}

const comparedSection = document.getElementById("compared");
comparedSection.append(
  ...byLabel(compared.differences, "run").map(([run, rows]) => differenceFigure(run, rows)),
  ...byLabel(compared.flips, "run").map(([run, rows]) => flipFigure(run, rows)),
  ...byLabel(compared.runs, "kind").map(([kind, rows]) => boardFigure(kind, rows)),
  ...(compared.strata.length ? [strataFigure(compared.strata)] : []),
  ...byLabel(compared.layers, "run").map(([run, rows]) => layerFigure(run, rows)),
);
equip(comparedSection);
