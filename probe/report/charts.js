// Charts are tables: every number is in the document, color and length only repeat it.

/** A figure: title, controls, chart, and how to read it. */
function figure(title, how, ...parts) {
  return el(
    "figure",
    null,
    el("figcaption", null, el("h3", null, title), el("p", { class: "how" }, how)),
    ...parts,
  );
}

function notCaptured(title, site) {
  return figure(title, "", el("p", { class: "absent" }, `not captured: this run did not keep ${site}`));
}

/** A horizontal bar of `share` (0 to 1) of its cell. */
function bar(share, kind = "") {
  return el("div", { class: `bar ${kind}`, "--share": Math.max(0, Math.min(1, share ?? 0)) }, el("i", null));
}

/** A bar that starts in the middle: changes of either sign, `share` from −1 to 1. */
function signedBar(share) {
  const size = Math.min(1, Math.abs(share ?? 0));
  return el("div", { class: `bar signed ${share < 0 ? "minus" : "plus"}`, "--share": size }, el("i", null));
}

/** Dots on a scale from 0 to 1: [label, value, low, high]; a row without interval is a tick. */
function dotPlot(rows) {
  const body = rows.map(([label, value, low, high]) => {
    const estimate = low !== null;
    const mark = estimate
      ? [el("i", { class: "range", "--from": low, "--to": high }), el("i", { class: "dot", "--at": value })]
      : el("i", { class: "tick", "--at": value });
    return el(
      "tr",
      { class: estimate ? "" : "reference" },
      el("th", { scope: "row" }, label),
      el("td", { class: "track" }, el("div", null, mark)),
      el("td", { class: "num" }, percent(value)),
    );
  });
  const scale = el(
    "tr",
    { class: "scale" },
    el("td", null),
    el("td", null, el("span", null, "0 %"), el("span", null, "50 %"), el("span", null, "100 %")),
    el("td", null),
  );
  return el("table", { class: "dots" }, el("tbody", null, body, scale));
}

/** An estimate on a scale from min to max that shows 0: a range, a dot, or a hollow dot for a control. */
function rangeTrack(measured, min, max, kind = "") {
  const at = (value) => Math.max(0, Math.min(1, (value - min) / (max - min)));
  const zero = el("i", { class: "zero", "--at": at(0) });
  if (!measured) return el("td", { class: "track" }, el("div", null, zero));
  const range =
    measured.low !== null &&
    el("i", { class: "range", "--from": at(measured.low), "--to": at(measured.high) });
  return el(
    "td",
    { class: "track" },
    el("div", null, zero, range, el("i", { class: `dot ${kind}`, "--at": at(measured.value) })),
  );
}

/** An estimate in words: value and interval. */
function estimate(measured, show = number) {
  if (!measured) return "–";
  return [
    show(measured.value),
    measured.low !== null && el("small", null, " ", interval(measured.low, measured.high, show)),
  ];
}

/** Exclusive choices as a row of buttons; `choose` is called with the value. */
function segmented(label, options, current, choose) {
  const buttons = options.map(([value, text]) =>
    el(
      "button",
      {
        type: "button",
        "aria-pressed": String(value === current),
        onclick: () => {
          for (const button of buttons) button.setAttribute("aria-pressed", "false");
          buttons[options.findIndex((option) => option[0] === value)].setAttribute("aria-pressed", "true");
          choose(value);
        },
      },
      text,
    ),
  );
  return el("div", { class: "segmented", role: "group", "aria-label": label }, buttons);
}

function dropdown(label, options, choose, current = null) {
  return el(
    "label",
    { class: "dropdown" },
    label,
    " ",
    el(
      "select",
      { onchange: (event) => choose(event.target.value) },
      options.map(([value, text]) => el("option", { value, selected: value === current }, text)),
    ),
  );
}

function legend(max, unit, format, min = 0) {
  return el(
    "div",
    { class: "legend" },
    el("span", null, format(min)),
    el("i", null),
    el("span", null, format(max)),
    el("span", { class: "unit" }, unit),
  );
}

/**
 * A heatmap. `groups` are tables of rows under one another, each {rows: [{label, cells, after, kind}]}; `cells`
 * are {value, text, say, mark?}, null where there is nothing to read. `kind` "heat" colors by value / max, "strip"
 * draws a bar of height `value` (0 to 1). Pointer or arrow keys read out one cell.
 */
function heatmap({ columns, corner, groups, max, after, numbers = false, shape = "" }) {
  const readout = el(
    "output",
    { class: "readout" },
    "point at a cell, or focus the figure and use the arrow keys",
  );
  const grid = [];
  const bodies = groups.map((rows) =>
    el(
      "tbody",
      null,
      rows.map((row) => {
        const cells = row.cells.map((cell) => heatCell(cell, row.kind, max, numbers));
        grid.push(cells);
        return el(
          "tr",
          { class: row.kind },
          el("th", { scope: "row", class: row.mark ?? "" }, row.label),
          cells,
          row.after.map((text) => el("td", { class: "after" }, text)),
        );
      }),
    ),
  );
  const head = el(
    "thead",
    null,
    el(
      "tr",
      null,
      headCell(corner, "corner"),
      columns.map((column) =>
        el(
          "th",
          { scope: "col", title: column.title, class: column.mark ?? "" },
          column.label || el("span", { class: "unseen" }, column.title),
        ),
      ),
      after.map((text) => headCell(text, "after")),
    ),
  );
  const table = el(
    "table",
    { class: `heat ${numbers ? "numbers" : ""} ${shape}`.trim(), tabindex: 0 },
    head,
    bodies,
  );
  readCells(table, grid, readout);
  return el("div", null, scrollBox(table), readout);
}

function heatCell(cell, kind, max, numbers) {
  if (cell === null || cell.value === null) return el("td", { class: "none" });
  const share = max > 0 ? Math.min(1, cell.value / max) : 0;
  // Where text on the cell has to change its color; on a dark page sooner than on a light one.
  const strong = kind !== "heat" ? "" : share > 0.62 ? " strong" : share > 0.45 ? " middle" : "";
  const node = el(
    "td",
    {
      class: `cell${strong}${cell.go ? " leads" : ""}${cell.mark ? ` ${cell.mark}` : ""}`,
      "--share": kind === "strip" ? Math.min(1, cell.value) : share,
    },
    kind === "strip" ? el("i", null) : null,
    el("span", { class: numbers ? "" : "unseen" }, cell.text),
  );
  node.say = cell.say;
  node.go = cell.go;
  return node;
}

/** Hover, focus and arrow keys over the cells of a table. */
function readCells(table, grid, readout) {
  let row = 0,
    column = 0,
    current = null;
  const point = (node) => {
    if (current) current.classList.remove("current");
    current = node;
    if (!node) return;
    node.classList.add("current");
    readout.textContent = node.say;
  };
  table.addEventListener("pointerover", (event) => {
    const node = event.target.closest("td.cell");
    if (node && table.contains(node)) point(node);
  });
  table.addEventListener("pointerleave", () => point(null));
  table.addEventListener("focus", () => grid[row]?.[column]?.say && point(grid[row][column]));
  table.addEventListener("blur", () => point(null));
  table.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && current?.go) {
      event.stopPropagation();
      address.set(current.go, current.go.tab !== undefined);
      return;
    }
    const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[
      event.key
    ] ?? [0, 0];
    if (!down && !right) return;
    event.preventDefault();
    event.stopPropagation();
    const [r, c] = [row + down, column + right];
    if (!grid[r]?.[c]?.say) return;
    [row, column] = [r, c];
    point(grid[r][c]);
    grid[r][c].scrollIntoView({ block: "nearest", inline: "nearest" });
  });
}

/** The prompt with its labelled spans; markup and system text stay plain. */
function promptText(pieces, tail) {
  const parts = pieces.map(([label, text]) => {
    const role = label?.split(":")[0];
    if (!["tool", "user", "question", "example", "bos"].includes(role)) return text;
    const tool = role === "tool" ? label.slice(5) : null;
    return el(
      "mark",
      { class: role, "data-tool": tool, "--hue": tool === null ? null : hueOf(tool) },
      role === "bos" ? null : el("b", null, label.replace(/^tool:/, "")),
      text,
    );
  });
  return el("pre", { class: "text prompt", tabindex: 0 }, parts, tail ?? null);
}

function promptFigure(task, tail) {
  const located = task.pieces.some(([label]) => label !== null);
  const how = located
    ? "The exact prompt. Colored text is what the spans of this page’s figures stand for."
    : "The exact prompt.";
  return figure(`Prompt · ${plural(task.n_prompt, "token")}`, how, promptText(task.pieces, tail));
}

/** What the prompt lacks, said above everything that was read from it. */
function cutNotice(truncation) {
  const text = `The prompt was shortened: ${truncation.rule} (${plural(truncation.tokens_dropped, "token")} dropped).`;
  return el("p", { class: "notice" }, text);
}

/** Single numbers side by side: [[name, value, unit or note], …]. */
function readings(items) {
  return el(
    "dl",
    { class: "readings" },
    items
      .filter((item) => item)
      .map(([name, value, note]) =>
        el(
          "div",
          null,
          el("dt", null, name),
          el("dd", null, value, note ? el("small", null, " ", note) : null),
        ),
      ),
  );
}

/** Measures that have no figure of their own. */
function measureTable(rows) {
  return scrollBox(
    el(
      "table",
      { class: "plain" },
      el(
        "thead",
        null,
        el(
          "tr",
          null,
          ["analyzer", "name", "where", "value", "95 % interval", "unit", "n"].map((text) =>
            el("th", null, text),
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
            el("td", null, row.analyzer),
            el("td", null, row.name),
            el("td", null, row.where),
            el("td", { class: "num" }, number(row.value, 4)),
            el("td", { class: "num" }, interval(row.low, row.high)),
            el("td", null, row.unit),
            el("td", { class: "num" }, count(row.n)),
          ),
        ),
      ),
    ),
  );
}

// -- words and scales that several figures share

/** What stands before the call, where the record does not say which part of it the user wrote. */
function promptEnd(task) {
  const [, text] = task.pieces[task.pieces.length - 1];
  const end =
    task.call_prefix && text.endsWith(task.call_prefix) ? text.slice(0, -task.call_prefix.length) : text;
  return end.length > 400 ? `… ${end.slice(-400).trim()}` : end.trim();
}

/** One color a tool, all over the page: each new hue falls into a widest gap (golden angle); of dozens some look alike. */
function hueOf(tool) {
  const place = PAGE.tools.indexOf(tool);
  return Math.round((250 + 137.508 * Math.max(0, place)) % 360);
}

function entryName(tool) {
  if (tool === null) return el("em", null, "no tool");
  return el("span", { class: "toolname", "data-tool": tool, "--hue": hueOf(tool) }, tool);
}

function tags(entry) {
  return [
    entry.chosen && el("span", { class: "tag chosen" }, "chosen"),
    entry.target && el("span", { class: "tag target" }, "target"),
  ];
}

/** Right, wrong or in between: a sign and a word, never color alone. */
function verdict(score) {
  if (score === null || score === undefined) return el("span", { class: "verdict" }, "–");
  if (score >= 1) return el("span", { class: "verdict right" }, "✓ right");
  if (score <= 0) return el("span", { class: "verdict wrong" }, "✗ wrong");
  return el("span", { class: "verdict part" }, `◐ ${score.toFixed(2)}`);
}

/** A change in log-odds: two decimals and a sign, so that columns align. */
function nats(value) {
  return typeof value === "number" ? (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2) : number(value);
}

/** The ends of a scale that holds all of these estimates and 0. */
function scaleOf(estimates) {
  const ends = estimates
    .filter(Boolean)
    .flatMap((measured) => [measured.value, measured.low, measured.high])
    .filter((value) => typeof value === "number");
  const min = Math.min(0, ...ends),
    max = Math.max(0, ...ends);
  const room = (max - min) * 0.04 || 1;
  return [min - room, max + room];
}

function scaleEnds(min, max, show) {
  return el("div", { class: "ends" }, el("span", null, show(min)), el("span", null, show(max)));
}

function range(measured, show) {
  return measured.low === null ? "no interval" : `95 % ${interval(measured.low, measured.high, show)}`;
}
