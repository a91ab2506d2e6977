// One chain-of-thought task: its question, the cycle of reading and writing, and the prompt.

function cotDetail(task) {
  const question = task.pieces
    .filter(([label]) => label === "question")
    .map(([, text]) => text)
    .join(" ");
  return [
    question ? el("blockquote", null, question) : null,
    ...cycleFigures(task, cotReadings(task)),
    outputFigure(task),
    promptFigure(task),
  ];
}

function cotReadings(task) {
  const total = Object.values(task.memory).reduce((a, b) => a + b, 0);
  return readings([
    ["answer", task.answer ?? "none was read"],
    ["target", task.target ?? "–"],
    [
      "whole KV memory",
      bytes(total),
      `${plural(task.n_prompt + task.n_new - 1, "position")}, the prompt included`,
    ],
    task.reconstruction_error !== null && [
      "memory check",
      number(task.reconstruction_error, 2),
      "largest relative error of the reads rebuilt from the saved memory",
    ],
    task.answer_forced ? ["answer cue", "forced", "the model did not announce an answer by itself"] : null,
  ]);
}
