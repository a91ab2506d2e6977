// The page: its tabs, the open task, keys, and what follows the address.

const TABS = [
  ["overview", "Overview"],
  ["tasks", "Tasks"],
  ["why", "Why"],
  ["inside", "Inside"],
  ["calibration", "Calibration"],
  ["output", "Output"],
  ["provenance", "Provenance"],
];
const sections = Object.fromEntries(TABS.map(([name]) => [name, document.getElementById(name)]));
const detail = document.getElementById("detail");

// -- the tabs ----------------------------------------------------------------------------------------------------

const tabLinks = TABS.map(([name, text]) =>
  linkTo(
    { tab: name },
    { "data-tab": name },
    text,
    name === "tasks" && el("small", null, ` ${PAGE.tasks.length}`),
  ),
);
document
  .querySelector("header")
  .append(el("nav", { class: "tabs", "aria-label": "Parts of the report" }, tabLinks));

function openTab() {
  const name = sections[address.state.tab] ? address.state.tab : "overview";
  for (const [other, section] of Object.entries(sections)) section.hidden = other !== name;
  for (const link of tabLinks) {
    const tab = link.dataset.tab;
    link.href = address.link({ tab });
    if (tab === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (name === "tasks" && (!address.state.task || !taskNamed(address.state.task)) && list.shown.length)
    address.set({ task: list.shown[0].id, tab: "tasks" });
  else if (name === "tasks") openTask();
}

function taskNamed(id) {
  return PAGE.tasks.find((task) => task.id === id);
}

const cards = PAGE.cards;
const DRAWN_TABS = {
  overview: () => [
    el("div", { class: "verdicts-here" }, PAGE.causes.map(causeArticle)),
    groupLinks(),
    variantOverview(PAGE.variants),
    confusionCard(cards.confusion),
  ],
  why: () => [
    whyOverview(cards.why),
    biasCard(cards.bias),
    reasoningCard(cards.reasoning),
    actionCard(cards.actions),
    attributionCard(cards.attribution),
    patchingCard(cards.patching),
    steeringCard(cards.steering),
    PAGE.causes.flatMap((part) => part.missing).map((missing) => notMeasured(missing)),
    cards.missing.length > 0 &&
      el(
        "p",
        { class: "notice" },
        `Not here for lack of experiments: ${cards.missing.join("; ")}. `,
        el("code", null, `probe analyze ${PAGE.command}`),
      ),
  ],
  inside: () => [headCard(cards.heads), layerCard(cards.layers)],
  calibration: () => [
    certaintyCard(cards.certainty),
    glanceCard(PAGE.tasks),
    foresightCard(cards.foresight),
    scorerCard(cards.scorers),
    orderCard(cards.orders),
  ],
  output: () => [distributionCard(cards.distribution)],
  provenance: () => [
    moreMeasures(PAGE.more, "More measures"),
    PAGE.measures.length > 0 &&
      el(
        "details",
        null,
        el("summary", null, `Other measures of the run as a whole (${PAGE.measures.length})`),
        measureTable(PAGE.measures),
      ),
  ],
};

function drawTabs() {
  for (const [name, draw] of Object.entries(DRAWN_TABS)) {
    const parts = draw().flat().filter(Boolean);
    sections[name].append(...parts);
    if (!sections[name].querySelector("figure, details, .notice, .headline"))
      sections[name].append(
        el(
          "p",
          { class: "notice" },
          PAGE.analyzed
            ? "Nothing of this was captured or measured in this run. "
            : "This run was not analyzed. ",
          !PAGE.analyzed && el("code", null, `probe analyze ${PAGE.command} --no-model`),
        ),
      );
    contents(sections[name]);
    equip(sections[name]);
  }
}

/** Links to the figures of a long tab. */
function contents(section) {
  const titled = [...section.querySelectorAll(":scope > figure")];
  if (titled.length < 3) return;
  titled[0].before(
    el(
      "nav",
      { class: "contents", "aria-label": "Figures" },
      titled.map((place) =>
        el(
          "button",
          { type: "button", onclick: () => place.scrollIntoView({ block: "start" }) },
          place.querySelector("h3").textContent,
        ),
      ),
    ),
  );
}

/** The tasks as dots: how sure against how likely at all; a box drawn over them is a search. */
function glanceCard(tasks) {
  const shown = tasks.filter((task) => task.confidence !== null && task.mass !== null && task.mass > 0);
  if (shown.length < 2) return null;
  const points = (right) =>
    shown
      .filter((task) => task.score >= 1 === right)
      .map((task) => ({
        x: task.confidence,
        y: task.mass,
        low: null,
        high: null,
        go: { task: task.id, tab: null },
        say: `${task.id}: P ${number(task.confidence)}, mass ${number(task.mass)}, ${right ? "right" : "wrong"}`,
      }));
  const lowest = Math.floor(Math.min(-1, ...shown.map((task) => Math.log10(task.mass))));
  const step = Math.max(1, Math.ceil(-lowest / 6));
  const ticks = [];
  for (let at = lowest; at <= 0; at += step) ticks.push(10 ** at);
  return figure(
    "Every task at a glance",
    "A dot a task: to the right the choice is surer, above the names hold more of the model’s probability. Filled: right; hollow: wrong. A dot opens its task; a box drawn with the pointer lists the tasks in it.",
    plot({
      title: null,
      x: SHARE(),
      y: scaleFrom(10 ** lowest, 1, { ticks, power: true }),
      xLabel: "P of the scored choice → candidate mass",
      series: [
        { kind: "", points: points(true) },
        { kind: "control", points: points(false) },
      ],
      joined: false,
      shape: "wide",
      boxed: ({ left, right, bottom, top }) =>
        address.set(
          {
            tab: "tasks",
            task: null,
            only: null,
            q: `confidence>=${left.toPrecision(3)} confidence<=${right.toPrecision(3)} mass>=${bottom.toPrecision(3)} mass<=${top.toPrecision(3)}`,
          },
          true,
        ),
    }),
  );
}

// -- the open task -------------------------------------------------------------------------------------------------

let drawnTask = null;
const asked = new Set(); // tasks whose details are on their way

function openTask() {
  const task = taskNamed(address.state.task);
  if (!task) return;
  showOpen();
  if (!Object.hasOwn(PAGE.details, task.id) && askServer(task)) return;
  if (drawnTask !== task.id) {
    drawnTask = task.id;
    detail.replaceChildren(...detailOf(task).flat().filter(Boolean));
    equip(detail);
    markSelection();
  }
  paintWaiting();
}

/** Ask for the details of a task and draw it when they come; false where there is nobody to ask. */
function askServer(task) {
  const answer = asked.has(task.id) ? null : (detailsFromServer(task) ?? detailsFromNotebook(task));
  if (!answer && !asked.has(task.id)) return false;
  detail.replaceChildren(el("p", { class: "muted", role: "status" }, `Reading ${task.id} …`));
  drawnTask = null;
  if (!answer) return true;
  asked.add(task.id);
  const ended = (draw) => {
    asked.delete(task.id);
    if (address.state.task === task.id) draw();
  };
  answer.then(
    (shown) => {
      PAGE.details[task.id] = shown;
      searched.delete(task.id);
      ended(openTask);
    },
    (error) =>
      ended(() =>
        detail.replaceChildren(
          detailHead(task),
          el("p", { class: "notice" }, `Could not be read: ${error.message}`),
        ),
      ),
  );
  return true;
}

function detailHead(task) {
  return el(
    "div",
    { class: "detailhead" },
    el("h2", null, task.id),
    el("span", { class: "muted" }, task.kind, " · ", task.status),
    verdict(task.score),
    el(
      "nav",
      { "aria-label": "Neighbours" },
      el("button", { type: "button", onclick: () => move(-1) }, "← previous"),
      el("button", { type: "button", onclick: () => move(1) }, "next →"),
    ),
  );
}

function detailOf(task) {
  const measured = Object.hasOwn(PAGE.details, task.id) ? PAGE.details[task.id] : null;
  const head = detailHead(task);
  if (!measured)
    return [
      head,
      el(
        "p",
        { class: "notice" },
        "This page lists the task without its texts, for the run is long. ",
        el("code", null, `probe show ${PAGE.command} ${task.id}`),
      ),
    ];
  if (measured.error !== undefined)
    return [
      head,
      el("p", { class: "notice" }, "This task failed, so nothing was captured:"),
      el("pre", { class: "text", tabindex: 0 }, measured.error),
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
  return task.pieces ? [outputFigure(task), promptFigure(task)] : [];
}

// -- keys and address -------------------------------------------------------------------------------------------------

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = /** @type {Element} */ (event.target).closest("input, select, textarea");
  const onList = event.target === items || items.contains(/** @type {Node} */ (event.target));
  const by = { j: 1, k: -1, ArrowDown: onList && 1, ArrowUp: onList && -1 }[event.key];
  if (event.key === "Escape" && !document.fullscreenElement) {
    address.set({ tab: "tasks" }, true);
    items.focus();
  } else if (!typing && event.key === "/") {
    event.preventDefault();
    address.set({ tab: "tasks" }, true);
    searchBox.focus();
    searchBox.select();
  } else if (!typing && by) {
    event.preventDefault();
    if (sections.tasks.hidden) address.set({ tab: "tasks" }, true);
    move(by);
  } else if (event.key === "Enter" && (event.target === items || event.target === searchBox)) {
    if (event.target === searchBox && list.shown.length) address.set({ task: list.shown[0].id });
    detail.focus({ preventScroll: true });
    detail.scrollIntoView({ block: "start" });
  }
});
searchBox.addEventListener("input", () => address.typed({ q: searchBox.value }));

address.listen((changed) => {
  if (["q", "only", "sort", "down"].some((name) => changed.includes(name))) {
    drawList();
    showOpen();
  }
  if (changed.includes("tab") || changed.includes("task")) openTab();
});

document.querySelectorAll(".dots-here").forEach((place, index) => {
  const dots = PAGE.headlines[index].dots;
  if (dots.length) place.replaceWith(dotPlot(dots));
});
document
  .querySelector(".tools-of-list")
  .append(
    searchBox,
    el(
      "div",
      { class: "row" },
      el("label", null, "show ", onlyBox),
      el("label", null, "sort ", sortBox),
      downBox,
    ),
    countBox,
  );
document.querySelector(".tools-of-list").after(items);
drawTabs();
drawList();
openTab();
markSelection();
