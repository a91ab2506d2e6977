// A page in a widget: what is open in it goes over a port to the notebook, and the details of tasks come back.

const askedFor = new Map();

const widgetPort = new Promise((ready) => {
  const hear = (event) => {
    if (event.source !== parent || !event.ports[0]) return;
    window.removeEventListener("message", hear);
    event.ports[0].onmessage = ({ data }) => {
      if (data.state) address.set(data.state);
      else askedFor.get(data.place)?.(data);
    };
    ready(event.ports[0]);
  };
  window.addEventListener("message", hear);
});

address.listen(() => widgetPort.then((port) => port.postMessage({ state: { ...address.state } })));

/** What the page shows of the task; rejects where the notebook cannot read it. */
function detailsFromNotebook(task) {
  const place = PAGE.tasks.indexOf(task);
  return new Promise((done, fail) => {
    askedFor.set(place, ({ details, error }) =>
      error === undefined ? done(details) : fail(new Error(error)),
    );
    widgetPort.then((port) => port.postMessage({ place }));
  });
}
