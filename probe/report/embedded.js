// A page in a widget: what is open in it goes over a port to the notebook, and the details of tasks come back.

const askedFor = new Map();
const PATIENCE_MS = 15_000;
let taking = false; // a state of the notebook, which is not told what it said

const widgetPort = new Promise((ready) => {
  const hear = (event) => {
    if (event.source !== parent || !event.ports[0]) return;
    window.removeEventListener("message", hear);
    event.ports[0].onmessage = ({ data }) => {
      if (data.state) take(data.state);
      else askedFor.get(data.place)?.(data);
    };
    ready(event.ports[0]);
  };
  window.addEventListener("message", hear);
});

let due = false;
/** Say what is open, once a turn. */
function tellNotebook() {
  if (due) return;
  due = true;
  widgetPort.then((port) => {
    due = false;
    port.postMessage({ state: { ...address.state } });
  });
}

/** Open what the notebook says; where the page opens something else, as of a task that is nowhere, the notebook learns that. */
function take(state) {
  taking = true;
  try {
    address.set(state);
  } finally {
    taking = false;
  }
  const differs = (name) => String(state[name] ?? "") !== String(address.state[name] ?? "");
  if (Object.keys(state).some(differs)) tellNotebook();
}

address.listen(() => {
  if (!taking) tellNotebook();
});

/** What the page shows of the task; rejects where the notebook cannot read it. A kernel that is busy may answer late. */
function detailsFromNotebook(task) {
  const place = PAGE.tasks.indexOf(task);
  return new Promise((done, fail) => {
    const waiting = setTimeout(() => {
      if (address.state.task === task.id)
        detail
          .querySelector("[role=status]")
          ?.append(" The notebook’s kernel does not answer: it is busy, or no longer runs.");
    }, PATIENCE_MS);
    askedFor.set(place, ({ details, error }) => {
      clearTimeout(waiting);
      if (error === undefined) done(details);
      else fail(new Error(error));
    });
    widgetPort.then((port) => port.postMessage({ place }));
  });
}
