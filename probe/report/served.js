// A page from `probe view`: the details of a task come from the server when it is opened.

/** What the page shows of the task; rejects where the server has ended or cannot read it. */
async function detailsFromServer(task) {
  const answer = await fetch(`task/${PAGE.version}/${PAGE.tasks.indexOf(task)}`).catch(() => {
    throw new Error("the server does not answer. Does probe view still run?");
  });
  if (!answer.ok) throw new Error(await answer.text());
  return answer.json();
}

/** Say it when the run has changed since the page was read; the page keeps its address when it is loaded again. */
async function lookForChanges() {
  const told = () => document.querySelector(".notice.changed");
  if (document.hidden || told()) return;
  const answer = await fetch("version").catch(() => null);
  if (!answer?.ok || (await answer.text()) === PAGE.version || told()) return;
  clearInterval(looking);
  document
    .querySelector("main")
    .prepend(
      el(
        "p",
        { class: "notice changed", role: "status" },
        "The run has changed since this page was read. ",
        el("button", { type: "button", onclick: () => location.reload() }, "reload"),
      ),
    );
}
const looking = setInterval(lookForChanges, PAGE.poll_ms);
document.addEventListener("visibilitychange", lookForChanges);
