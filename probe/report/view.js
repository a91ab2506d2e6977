// The page: table of tasks, the open task, keys, and #task=ID in the address.

const PAGE = JSON.parse(document.getElementById("data").textContent);
const DRAWN = 500; // rows drawn before the reader asks for all
const COLUMNS = [
  ["id", "id", "words"],
  ["kind", "kind", "words"],
  ["status", "status", "words"],
  ["target", "target", "words"],
  ["chosen", "scored choice or answer", "words"],
  ["score", "score", "num"],
  ["called", "generated call", "words"],
  ["call_right", "call", "num"],
  ["turns", "turns", "num"],
  ["mass", "candidate mass", "num"],
  ["margin", "margin, nats", "num"],
  ["entropy", "entropy, nats", "num"],
  ["tokens", "tokens", "num"],
  ["seconds", "seconds", "num"],
];
const OPTIONAL = ["called", "call_right", "turns", "mass", "margin", "entropy"];
const LOW_MASS = 0.05; // below it, the scored choice is among names that the model would hardly write
const VISIBLE = COLUMNS.filter(
  ([key]) => !OPTIONAL.includes(key) || PAGE.tasks.some((task) => task[key] !== null),
);
const view = { sort: null, descending: false, all: false, open: null, shown: [] };
const filterBox = /** @type {HTMLInputElement} */ (document.getElementById("filter"));
const only = /** @type {HTMLSelectElement} */ (document.getElementById("only"));
/** @type {HTMLElement} */
const tableBox = document.querySelector(".tablebox");
const detail = document.getElementById("detail");

/** Right, wrong or in between: a sign and a word, never color alone. */
function verdict(score) {
  if (score === null || score === undefined) return el("span", { class: "verdict" }, "–");
  if (score >= 1) return el("span", { class: "verdict right" }, "✓ right");
  if (score <= 0) return el("span", { class: "verdict wrong" }, "✗ wrong");
  return el("span", { class: "verdict part" }, `◐ ${score.toFixed(2)}`);
}

function failed(task) {
  return task.status !== "ok" && task.status !== "truncated";
}

// -- the table ---------------------------------------------------------------------------------------------------

function matching() {
  const words = filterBox.value.toLowerCase().split(/\s+/).filter(Boolean);
  const keep = {
    all: () => true,
    right: (task) => task.score !== null && task.score >= 1,
    wrong: (task) => task.score !== null && task.score < 1,
    "call right": (task) => task.call_right === true,
    "call wrong": (task) => task.call_right === false,
    "low mass": (task) => task.mass !== null && task.mass < LOW_MASS,
    failed,
  }[only.value];
  const tasks = PAGE.tasks.filter((task) => {
    const text = [task.id, task.kind, task.status, task.target, task.chosen, task.called]
      .join(" ")
      .toLowerCase();
    return keep(task) && words.every((word) => text.includes(word));
  });
  if (view.sort === null) return tasks;
  const sign = view.descending ? -1 : 1;
  return tasks.sort((a, b) => sign * compare(a[view.sort], b[view.sort], sign));
}

/** Order of two values; what is absent comes last either way. */
function compare(a, b, sign) {
  if (a === null || b === null) return a === b ? 0 : (a === null ? 1 : -1) * sign;
  return typeof a === "number" && typeof b === "number"
    ? a - b
    : String(a).localeCompare(String(b), "en", { numeric: true });
}

function drawTable() {
  view.shown = matching();
  const drawn = view.all ? view.shown : view.shown.slice(0, DRAWN);
  const head = el(
    "tr",
    null,
    VISIBLE.map(([key, text, kind]) =>
      el(
        "th",
        {
          class: kind,
          "aria-sort": view.sort === key ? (view.descending ? "descending" : "ascending") : null,
        },
        el("button", { type: "button", onclick: () => sortBy(key) }, text),
      ),
    ),
  );
  const rows = drawn.map((task) =>
    el(
      "tr",
      {
        "data-id": task.id,
        class: failed(task) ? "failed" : "",
        "aria-selected": String(task.id === view.open),
        onclick: () => openTask(task.id),
      },
      VISIBLE.map(([key, , kind]) => el("td", { class: `${kind} ${key}` }, tableCell(task, key))),
    ),
  );
  const more =
    view.shown.length > drawn.length &&
    el(
      "button",
      {
        type: "button",
        class: "more",
        onclick: () => {
          view.all = true;
          drawTable();
        },
      },
      `show all ${view.shown.length} tasks`,
    );
  tableBox.replaceChildren(el("table", { class: "tasks" }, el("thead", null, head), el("tbody", null, rows)));
  if (more) tableBox.append(more);
  const planned =
    PAGE.planned > PAGE.tasks.length ? `; ${PAGE.planned - PAGE.tasks.length} of the run are missing` : "";
  document.getElementById("count").textContent =
    `${view.shown.length} of ${plural(PAGE.tasks.length, "task")}${planned}`;
}

function tableCell(task, key) {
  const value = task[key];
  if (key === "id") return el("a", { href: `#task=${encodeURIComponent(value)}` }, value);
  if (key === "score") return verdict(value);
  if (key === "call_right") return verdict(value === null ? null : Number(value));
  if (key === "mass") return value === null ? "–" : probability(value);
  if (key === "seconds") return value === null ? "–" : value.toFixed(2);
  if (key === "tokens") return value === null ? "–" : value.toLocaleString("en-US");
  if (key === "margin" || key === "entropy") return value === null ? "–" : value.toFixed(2);
  return value === null ? "–" : value;
}

function sortBy(key) {
  view.descending = view.sort === key && !view.descending;
  view.sort = key;
  drawTable();
}

// -- the open task -------------------------------------------------------------------------------------------------

function openTask(id, remember = true) {
  const task = PAGE.tasks.find((candidate) => candidate.id === id);
  if (!task) return;
  view.open = id;
  for (const row of /** @type {NodeListOf<HTMLElement>} */ (tableBox.querySelectorAll("tr[data-id]"))) {
    const chosen = row.dataset.id === id;
    row.setAttribute("aria-selected", String(chosen));
    if (chosen) showRow(row);
  }
  detail.replaceChildren(...detailOf(task).flat().filter(Boolean));
  paintWaiting();
  if (remember) history.replaceState(null, "", `#task=${encodeURIComponent(id)}`);
}

/** Scroll the table, not the page. */
function showRow(row) {
  const head = tableBox.querySelector("thead").offsetHeight;
  const top = row.offsetTop - head,
    bottom = row.offsetTop + row.offsetHeight;
  if (top < tableBox.scrollTop) tableBox.scrollTop = top;
  else if (bottom > tableBox.scrollTop + tableBox.clientHeight)
    tableBox.scrollTop = bottom - tableBox.clientHeight;
}

function detailOf(task) {
  const measured = Object.hasOwn(PAGE.details, task.id) ? PAGE.details[task.id] : null;
  const head = el(
    "div",
    { class: "detailhead" },
    el("h2", null, task.id),
    el("span", { class: "muted" }, task.kind, " · ", task.status),
    verdict(task.score),
    el(
      "nav",
      null,
      el("button", { type: "button", onclick: () => move(-1) }, "← previous"),
      el("button", { type: "button", onclick: () => move(1) }, "next →"),
    ),
  );
  if (!measured)
    return [
      head,
      el(
        "p",
        { class: "notice" },
        "This page lists the task without its texts, for the run is long: `probe show RUN TASK` prints it.",
      ),
    ];
  if (measured.error !== undefined)
    return [
      head,
      el("p", { class: "notice" }, "This task failed, so nothing was captured:"),
      el("pre", { class: "text" }, measured.error),
    ];
  const truncation =
    measured.truncation ?? measured.passages?.find((passage) => passage.truncation)?.truncation;
  if (truncation) head.append(cutNotice(truncation));
  if (measured.texts_only)
    return [
      head,
      el(
        "p",
        { class: "notice" },
        `Figures are embedded for the first ${PAGE.limit} tasks. The numbers of this one are in measures.parquet: \`probe export\`.`,
      ),
      ...measured.passages.flatMap((passage) => [
        passage.name && el("h3", null, passage.name),
        ...transcript(passage),
      ]),
    ];
  const draw =
    {
      tool_selection: toolDetail,
      prompting: promptingDetail,
      cot: cotDetail,
      agent: agentDetail,
      replay: agentDetail,
    }[measured.kind] ?? transcript;
  const more = measured.more.length
    ? figure("Other measures", "Measures of analyzers that have no figure here.", measureTable(measured.more))
    : null;
  return [head, ...draw(measured), moreMeasures(measured.pictures, "More measures of this task"), more];
}

/** A kind of task without figures of its own. */
function transcript(task) {
  return task.pieces
    ? [promptFigure(task, el("mark", { class: "completion" }, el("b", null, "generated"), task.completion))]
    : [];
}

function move(by) {
  const at = view.shown.findIndex((task) => task.id === view.open);
  const next = view.shown[at < 0 ? 0 : Math.max(0, Math.min(view.shown.length - 1, at + by))];
  if (next) openTask(next.id);
}

// -- keys and address -------------------------------------------------------------------------------------------------

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = /** @type {Element} */ (event.target).closest("input, select, textarea");
  if (event.key === "Escape") {
    tableBox.focus();
    document.getElementById("tasks").scrollIntoView({ block: "start" });
  } else if (!typing && event.key === "/") {
    event.preventDefault();
    filterBox.focus();
    filterBox.select();
  } else if (!typing && (event.key === "j" || event.key === "k")) {
    move(event.key === "j" ? 1 : -1);
  } else if (event.target === tableBox && (event.key === "ArrowDown" || event.key === "ArrowUp")) {
    event.preventDefault();
    move(event.key === "ArrowDown" ? 1 : -1);
  } else if (
    event.key === "Enter" &&
    (event.target === tableBox || event.target === document.body || event.target === filterBox)
  ) {
    if (event.target === filterBox && view.shown.length) openTask(view.shown[0].id);
    detail.focus({ preventScroll: true });
    detail.scrollIntoView({ block: "start" });
  }
});
for (const box of [filterBox, only])
  box.addEventListener("input", () => {
    view.all = false;
    drawTable();
  });
window.addEventListener("hashchange", () => openFromAddress());

function openFromAddress() {
  const named = location.hash.match(/^#task=(.*)$/);
  let id = null;
  try {
    id = named && decodeURIComponent(named[1]);
  } catch {
    /* not an address that this page made */
  }
  const present = id !== null && PAGE.tasks.some((task) => task.id === id);
  if (present || PAGE.tasks.length) openTask(present ? id : PAGE.tasks[0].id, false);
  if (present)
    requestAnimationFrame(() => {
      // once the window has its size
      if (detail.getBoundingClientRect().top > innerHeight - 250) detail.scrollIntoView({ block: "start" });
    });
}

document.querySelectorAll(".dots-here").forEach((place, index) => {
  const dots = PAGE.headlines[index].dots;
  if (dots.length) place.replaceWith(dotPlot(dots));
});
const overview = document.getElementById("overview");
const cards = PAGE.cards;
overview.append(
  ...[
    variantOverview(PAGE.variants),
    biasCard(cards.bias),
    certaintyCard(cards.certainty),
    foresightCard(cards.foresight),
    scorerCard(cards.scorers),
    confusionCard(cards.confusion),
    orderCard(cards.orders),
    whyOverview(cards.why),
    actionCard(cards.actions),
    attributionCard(cards.attribution),
    patchingCard(cards.patching),
    steeringCard(cards.steering),
    headCard(cards.heads),
    layerCard(cards.layers),
    reasoningCard(cards.reasoning),
    distributionCard(cards.distribution),
  ].filter(Boolean),
);
const titled = [...overview.querySelectorAll("figure")];
if (titled.length > 2)
  overview.prepend(
    el(
      "nav",
      { class: "contents", "aria-label": "Figures of the run" },
      [...titled, document.getElementById("tasks")].map((place) =>
        el(
          "button",
          { type: "button", onclick: () => place.scrollIntoView({ block: "start" }) },
          place.querySelector("h2, h3").textContent,
        ),
      ),
    ),
  );
if (cards.missing.length)
  overview.append(
    el(
      "p",
      { class: "notice" },
      `Not here for lack of experiments: ${cards.missing.join("; ")}. \`probe analyze RUN\` makes them.`,
    ),
  );
const pictures = moreMeasures(PAGE.more, "More measures");
if (pictures) overview.append(pictures);
if (PAGE.measures.length)
  overview.append(
    el(
      "details",
      null,
      el("summary", null, `Other measures of the run as a whole (${PAGE.measures.length})`),
      measureTable(PAGE.measures),
    ),
  );
drawTable();
openFromAddress();
