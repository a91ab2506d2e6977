// A page from `probe view`: the details of a task come from the server when it is opened.

/** What the page shows of the task; rejects where the server has ended or cannot read it. */
async function detailsFromServer(task) {
  const answer = await fetch(`task/${PAGE.tasks.indexOf(task)}`).catch(() => {
    throw new Error("the server does not answer. Does probe view still run?");
  });
  if (!answer.ok) throw new Error(await answer.text());
  return answer.json();
}
