// One agent task: its turns, what each called, what came back, and P(tool | context) at each decision.

function agentDetail(task) {
  const request = task.pieces
    .filter(([label]) => label === "user")
    .map(([, text]) => text)
    .join(" … ");
  return [
    request ? el("blockquote", null, request) : el("blockquote", { class: "tail" }, promptEnd(task)),
    ...cycleFigures(task),
    turnsFigure(task),
    promptFigure(task, el("mark", { class: "completion" }, el("b", null, "transcript"), task.completion)),
  ];
}

function turnsFigure(task) {
  return figure(
    "Turns",
    "Each turn is a decision. P(tool | context) is scored in the slot that the turn’s call reached; where it made no call, with the call’s opener attached on the side.",
    tokenKey(task),
    el(
      "ol",
      { class: "turns" },
      task.turns.map((turn) => turnItem(task, turn)),
    ),
    readings([
      ["answer", (task.answer ?? "–").length > 200 ? "the last turn" : (task.answer ?? "–")],
      ["expected", task.expected ?? "–"],
      ["ended by", task.ended_by],
    ]),
  );
}

function turnItem(task, turn) {
  return el(
    "li",
    null,
    el("h4", null, `Turn ${turn.turn}`),
    el(
      "div",
      { class: "columns" },
      el(
        "div",
        null,
        tokenText(task, {
          within: [turn.start - task.n_prompt, turn.end - task.n_prompt],
          text: turn.text,
          kind: "call",
        }),
        callLine(turn),
        turn.result && resultOf(turn.result),
      ),
      el("div", null, turnChoices(turn)),
    ),
  );
}

/** What was called with what; arguments as the call gave them. */
function callLine(turn) {
  const given = turn.call?.arguments;
  const what = turn.called ?? (turn.call ? el("em", null, "no tool") : el("em", null, "nothing"));
  return el(
    "p",
    { class: "call" },
    el("b", null, "called "),
    what,
    given !== undefined && given !== null && el("code", null, " ", JSON.stringify(given)),
    turn.call_error && el("span", { class: "tag wrong" }, turn.call_error),
  );
}

function resultOf(result) {
  const notes = [
    result.error,
    result.shown ? null : "not given back",
    result.tokens_left_out ? `${result.tokens_left_out} tokens left out` : null,
  ].filter(Boolean);
  return el(
    "div",
    null,
    el(
      "p",
      { class: "call" },
      el("b", null, "result "),
      notes.map((note) => el("span", { class: "tag" }, note)),
    ),
    el("pre", { class: "text call", tabindex: 0 }, result.content ?? "–"),
  );
}

function turnChoices(turn) {
  const rows = turn.entries.map((entry) =>
    el(
      "tr",
      { class: entry.chosen ? "chosen" : "" },
      el("th", { scope: "row" }, entryName(entry.tool), " ", tags(entry)),
      el("td", { class: "wide" }, bar(entry.probability, entry.chosen ? "chosen" : "")),
      el("td", { class: "num" }, probability(entry.probability)),
    ),
  );
  return [
    el(
      "table",
      { class: "bars" },
      el(
        "thead",
        null,
        el(
          "tr",
          null,
          ["P(tool | context)", "", "P"].map((text, index) => headCell(text, index > 1 ? "num" : "")),
        ),
      ),
      el("tbody", null, rows),
    ),
    readings([
      ["slot", turn.slot],
      ["candidate mass", number(turn.candidate_mass)],
      turn.opener_log_prob !== null && ["log P(opener)", number(turn.opener_log_prob), "nats"],
    ]),
  ];
}
