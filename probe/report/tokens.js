// What the model wrote, token by token: each with its probability at pointer or keyboard, the improbable ones underlined.

const IMPROBABLE = [0.5, 0.1, 0.01]; // below each the line below a token is another: dotted, dashed, double

/** The generated text. `task` has tokens and log-probabilities, or neither; `within` are the first token and the one behind the
 *  last, `before` what stands in front. */
function tokenText(task, { within = null, text = task.completion, before = null, kind = "" } = {}) {
  const shape = `text tokens ${kind}`.trim();
  if (!task.token_lengths)
    return [el("pre", { class: shape.replace(" tokens", ""), tabindex: 0 }, before, text || "–")];
  const [first, end] = within ?? [0, task.token_lengths.length];
  const readout = el("output", { class: "readout" }, READ_TOKENS);
  const nodes = tokenNodes(task, first, end);
  const place = el("pre", { class: shape, tabindex: 0 }, before, nodes);
  place.numbers = () => [
    ["token", "text", "log P, nats", "P"],
    ...nodes.flatMap((node) => node.rows(node.textContent)),
  ];
  readTokens(place, nodes, readout);
  return [readout, place];
}

const READ_TOKENS = "point at a token, or focus the text and use ← → for its probability";

/** A node for each stretch of text that has tokens of its own: mostly one, of a character in bytes several. */
function tokenNodes(task, first, end) {
  const nodes = [];
  let at = 0;
  for (let index = 0; index < first; index++) at += task.token_lengths[index];
  let begin = first;
  for (let index = first; index < end; index++) {
    const characters = task.token_lengths[index];
    if (!characters && task.token_lengths.slice(index + 1, end).some(Boolean)) continue;
    nodes.push(tokenNode(task, begin, index + 1, at, at + characters));
    at += characters;
    begin = index + 1;
  }
  return nodes;
}

function tokenNode(task, begin, end, from, to) {
  const logs = task.log_probs.slice(begin, end);
  const log = logs.reduce((sum, value) => sum + logProb(value), 0);
  const level = IMPROBABLE.filter((bound) => Math.exp(log) < bound).length;
  const text = task.completion.slice(from, to);
  const node = el("span", { class: `token${level ? ` rare${level}` : ""}${text ? "" : " silent"}` }, text);
  node.say = () => {
    const which =
      end - begin > 1
        ? `tokens ${begin + 1} to ${end} of ${task.token_lengths.length}`
        : `token ${end} of ${task.token_lengths.length}`;
    const words = text ? `“${shownBlanks(text)}”` : "writes nothing: it ends the turn or begins a character";
    const each = end - begin > 1 ? ` together (${logs.map((value) => number(value)).join(", ")})` : "";
    return `${which} · ${words} · P ${probability(Math.exp(log))} · log P ${log === -Infinity ? LEAST : number(log)} nats${each}`;
  };
  node.rows = () =>
    logs.map((value, index) => [
      begin + index + 1,
      index === logs.length - 1 ? text : "",
      value,
      Math.exp(logProb(value)),
    ]);
  return node;
}

const LEAST = "−∞";

/** A log-probability as a number: data has no word for that of 0 but a text. */
function logProb(value) {
  return value === LEAST ? -Infinity : value;
}

function shownBlanks(text) {
  return text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");
}

/** Hover, focus and arrow keys over the tokens of a text. */
function readTokens(place, nodes, readout) {
  const order = new Map(nodes.map((node, index) => [node, index]));
  let at = 0,
    current = null;
  const point = (node) => {
    current?.classList.remove("current");
    current = node ?? null;
    if (!node) return;
    at = order.get(node);
    node.classList.add("current");
    readout.textContent = node.say();
  };
  place.addEventListener("pointerover", (event) => {
    const node = event.target.closest(".token");
    if (order.has(node)) point(node);
  });
  place.addEventListener("pointerleave", () => point(null));
  place.addEventListener("focus", () => point(nodes[at]));
  place.addEventListener("blur", () => point(null));
  place.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: nodes.length - 1 }[event.key];
    if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    if (!nodes[to]) return;
    point(nodes[to]);
    nodes[to].scrollIntoView({ block: "nearest", inline: "nearest" });
  });
}

/** What the lines below tokens mean; nothing where a record does not say where tokens end. */
function tokenKey(task) {
  return (
    task.token_lengths &&
    el(
      "p",
      { class: "how tokenkey" },
      "Underlined where the model itself gave the token less than ",
      IMPROBABLE.flatMap((bound, index) => [
        index > 0 && (index < 2 ? ", " : " or "),
        el("span", { class: `token rare${index + 1}` }, `P ${bound}`),
      ]),
      ", before temperature and truncation.",
    )
  );
}

/** The whole output as a figure of its own. */
function outputFigure(task) {
  return figure(
    `Output · ${plural(task.n_new, "token")}, ended by ${task.finish_reason}`,
    "All that was generated, as it was.",
    tokenKey(task),
    ...tokenText(task),
  );
}
