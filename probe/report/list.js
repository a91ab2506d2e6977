// The list of tasks: searched, filtered and sorted, all of it in the address.

const DRAWN = 150; // items that are drawn before the reader scrolls to their end
const LOW_MASS = 0.05; // below it, the scored choice is among names that the model would hardly write
const LOW_MARGIN = 0.5; // nats
const SORTS = [
  ["", "order of the file"],
  ["score", "score"],
  ["call_right", "generated call"],
  ["mass", "candidate mass"],
  ["margin", "margin"],
  ["entropy", "entropy"],
  ["confidence", "P of the scored choice"],
  ["turns", "turns"],
  ["tokens", "tokens"],
  ["seconds", "seconds"],
  ["id", "id"],
  ["target", "target"],
  ["chosen", "scored choice or answer"],
];
/** @type {[string, string, (task: any) => boolean][]} value, label, who is kept */
const ONLY = [
  ["", "all", () => true],
  ["wrong", "wrong", (task) => task.score !== null && task.score < 1],
  ["right", "right", (task) => task.score !== null && task.score >= 1],
  ["call wrong", "generated call wrong", (task) => task.call_right === false],
  ["call right", "generated call right", (task) => task.call_right === true],
  ["disagree", "scored and called differ", (task) => task.agrees === false],
  [
    "low margin",
    `margin below ${LOW_MARGIN} nats`,
    (task) => task.margin !== null && task.margin < LOW_MARGIN,
  ],
  ["low mass", `candidate mass below ${LOW_MASS}`, (task) => task.mass !== null && task.mass < LOW_MASS],
  ["cut", "text cut at the limit", (task) => task.cut],
  ["failed", "failed", (task) => failed(task)],
];
const SEARCHED = [
  ...[
    "id",
    "kind",
    "status",
    "question",
    "target",
    "right",
    "chosen",
    "called",
    "call_error",
    "score",
    "mass",
  ],
  ...["margin", "entropy", "confidence", "turns", "tokens", "seconds"],
];

function failed(task) {
  return task.status !== "ok" && task.status !== "truncated";
}

// -- the search --------------------------------------------------------------------------------------------------

/** A word that finds a field's exact value, quoted where it has to be. */
function exactly(field, value) {
  return `${field}=${/^[^\s"]+$/.test(value) ? value : JSON.stringify(value)}`;
}

/**
 * What a search keeps: every word is in the task's texts, and every `field=value`, `!=`, `<`, `>`, `<=`, `>=` holds.
 * Fields are those of the list and the keys of the metadata; quotes hold a value with spaces together.
 */
function searchOf(text) {
  const keys = new Set(PAGE.tasks.flatMap((task) => Object.keys(task.metadata)));
  const tests = [];
  for (const [whole, field, sign, quoted, plain] of text.matchAll(
    /(?:([\w.-]+)(!=|<=|>=|=|<|>))?(?:"((?:[^"\\]|\\.)*)"|(\S+))/g,
  )) {
    const value = quoted === undefined ? plain : quoted.replace(/\\(["\\])/g, "$1");
    const known = field !== undefined && (SEARCHED.includes(field) || keys.has(field));
    if (known)
      tests.push((task) => holds(SEARCHED.includes(field) ? task[field] : task.metadata[field], sign, value));
    else {
      const word = (quoted === undefined ? whole : value).toLowerCase();
      tests.push((task) => textOf(task).includes(word));
    }
  }
  return (task) => tests.every((test) => test(task));
}

function holds(present, sign, wanted) {
  if (present === null || present === undefined) return sign === "!=";
  const [a, b] = typeof present === "number" ? [present, Number(wanted)] : [String(present), wanted];
  return { "=": a === b, "!=": a !== b, "<": a < b, ">": a > b, "<=": a <= b, ">=": a >= b }[sign];
}

const searched = new Map();

/** All that is searched of a task, what the model wrote included, in small letters. */
function textOf(task) {
  if (!searched.has(task.id)) {
    const open = Object.hasOwn(PAGE.details, task.id) ? PAGE.details[task.id] : {};
    const written = [open, ...(open.passages ?? []), ...(open.variants ?? [])].map((part) => part.completion);
    const parts = [...SEARCHED.map((field) => task[field]), ...Object.values(task.metadata), ...written];
    searched.set(
      task.id,
      parts
        .filter((part) => typeof part === "string")
        .join("\n")
        .toLowerCase(),
    );
  }
  return searched.get(task.id);
}

/** Order of two values; what is absent comes last either way. */
function compare(a, b, sign) {
  if (a === null || b === null) return a === b ? 0 : (a === null ? 1 : -1) * sign;
  return typeof a === "string" ? a.localeCompare(String(b), "en", { numeric: true }) : Number(a) - Number(b);
}

function matching() {
  const { q, only, sort, down } = address.state;
  const keep = (ONLY.find(([value]) => value === only) ?? ONLY[0])[2];
  const search = searchOf(q ?? "");
  const tasks = PAGE.tasks.filter((task) => keep(task) && search(task));
  if (!SORTS.some(([key]) => key && key === sort)) return down ? tasks.reverse() : tasks;
  const sign = down ? -1 : 1;
  return tasks.sort((a, b) => sign * compare(a[sort], b[sort], sign));
}

// -- the list ------------------------------------------------------------------------------------------------------

const list = { shown: [], drawn: 0 };
const searchBox = el("input", {
  id: "filter",
  type: "search",
  placeholder: "search, or mass<0.1 margin<1 …",
  "aria-label": "Search tasks",
  "aria-describedby": "search-help",
  autocomplete: "off",
  spellcheck: "false",
});
const onlyBox = el(
  "select",
  { "aria-label": "Show", onchange: () => address.set({ only: onlyBox.value }) },
  ONLY.filter(([, , keep]) => PAGE.tasks.some(keep)).map(([value, text]) => el("option", { value }, text)),
);
const sortBox = el(
  "select",
  { "aria-label": "Sort by", onchange: () => address.set({ sort: sortBox.value }) },
  SORTS.filter(
    ([key]) => !key || PAGE.tasks.some((task) => task[key] !== null && task[key] !== PAGE.tasks[0][key]),
  ).map(([value, text]) => el("option", { value }, text)),
);
const downBox = el(
  "button",
  { type: "button", onclick: () => address.set({ down: address.state.down ? null : 1 }) },
  "↑",
);
const countBox = el("output", { id: "count" });
const items = el("ol", { class: "items", tabindex: 0, "aria-label": "List of tasks" });

function drawList() {
  const { q, only, sort, down } = address.state;
  if (searchBox.value !== (q ?? "")) searchBox.value = q ?? "";
  onlyBox.value = only ?? "";
  sortBox.value = sort ?? "";
  downBox.textContent = down ? "↓" : "↑";
  downBox.setAttribute("aria-label", down ? "descending: turn round" : "ascending: turn round");
  list.shown = matching();
  list.drawn = 0;
  items.replaceChildren();
  drawMore();
  const missing = PAGE.planned - PAGE.tasks.length;
  countBox.textContent = `${list.shown.length} of ${plural(PAGE.tasks.length, "task")}${missing > 0 ? `; ${missing} of the run are missing` : ""}`;
}

function drawMore(until = list.drawn + DRAWN) {
  const next = list.shown.slice(list.drawn, until);
  items.append(...next.map(taskItem));
  list.drawn += next.length;
}

items.addEventListener("scroll", () => {
  if (items.scrollTop + items.clientHeight > items.scrollHeight - 400) drawMore();
});

function taskItem(task) {
  const open = task.id === address.state.task;
  const facts = [
    task.mass !== null && `mass ${number(task.mass, 2)}`,
    task.margin !== null && `margin ${number(task.margin, 2)} nats`,
    task.turns !== null && plural(task.turns, "turn"),
    failed(task) && task.status,
    ...Object.values(task.metadata).map(String),
  ].filter(Boolean);
  const fact = (name, value, mark) =>
    value !== null && el("span", null, el("small", null, `${name} `), value, mark && [" ", mark]);
  return el(
    "li",
    {
      "data-id": task.id,
      class: failed(task) ? "failed" : "",
      onclick: () => address.set({ task: task.id }),
    },
    el(
      "div",
      { class: "top" },
      linkTo({ task: task.id, tab: null }, { tabindex: -1, "aria-current": open ? "true" : null }, task.id),
      verdict(task.score),
    ),
    task.question && el("p", { class: "question" }, task.question),
    el(
      "p",
      { class: "choices" },
      fact("target", task.target),
      fact(task.called === null ? "answer" : "scored", task.chosen),
      fact("called", task.called, task.call_right === null ? null : task.call_right ? "✓" : "✗"),
    ),
    facts.length > 0 && el("p", { class: "facts-line" }, facts.join(" · ")),
  );
}

/** Mark the open task in the list and scroll the list, not the page. */
function showOpen() {
  const at = list.shown.findIndex((task) => task.id === address.state.task);
  if (at >= list.drawn) drawMore(at + 20);
  for (const item of /** @type {HTMLCollectionOf<any>} */ (items.children)) {
    const link = item.querySelector("a");
    if (item.dataset.id !== address.state.task) link.removeAttribute("aria-current");
    else {
      link.setAttribute("aria-current", "true");
      showItem(items, item);
    }
  }
}

/** Scroll a list, not the page. */
function showItem(box, item) {
  const top = item.offsetTop - box.offsetTop,
    bottom = top + item.offsetHeight;
  if (top < box.scrollTop) box.scrollTop = top - 8;
  else if (bottom > box.scrollTop + box.clientHeight) box.scrollTop = bottom - box.clientHeight + 8;
}

function move(by) {
  const at = list.shown.findIndex((task) => task.id === address.state.task);
  const next = list.shown[at < 0 ? 0 : Math.max(0, Math.min(list.shown.length - 1, at + by))];
  if (next) address.set({ task: next.id });
}

/** A group of tasks of the first screen: how many, and the list of them. */
function groupLinks() {
  const groups = ONLY.slice(1)
    .map(([value, text, keep]) => [value, text, PAGE.tasks.filter(keep).length])
    .filter(([, , n]) => n);
  return el(
    "nav",
    { class: "groups", "aria-label": "Tasks" },
    linkTo(
      { tab: "tasks", task: null, only: null, q: null },
      null,
      `all ${plural(PAGE.tasks.length, "task")}`,
    ),
    groups.map(([only, text, n]) =>
      linkTo({ tab: "tasks", task: null, only, q: null }, null, `${n} ${text}`),
    ),
    PAGE.tasks.some((task) => task.score !== null) &&
      linkTo(
        { tab: "tasks", task: null, only: null, q: null, sort: "score", down: null },
        null,
        "wrong ones first",
      ),
  );
}
