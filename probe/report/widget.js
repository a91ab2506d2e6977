// A report in a notebook: a frame without an origin, and one message port between it and the widget's model.

const SHARED = ["tool", "layer", "head", "step", "q"];

/** What the model says is open, as the page's address has it. */
function stateOf(model) {
  const { task, card, selection } = {
    task: model.get("task"),
    card: model.get("card"),
    selection: model.get("selection"),
  };
  const shared = Object.fromEntries(SHARED.map((name) => [name, selection?.[name] ?? null]));
  return { tab: card, task, ...shared };
}

function render({ model, el }) {
  const frame = document.createElement("iframe");
  frame.title = "probe report";
  frame.setAttribute("sandbox", "allow-scripts allow-downloads");
  frame.style.cssText = "width: 100%; border: 1px solid #8888; border-radius: 6px;";
  const size = () => {
    frame.style.height = `${model.get("height")}px`;
  };
  let port = null;
  let due = false;
  /** Once a turn: the model tells of each of its values as it is set, and the page is to have all of them. */
  const show = () => {
    if (due) return;
    due = true;
    queueMicrotask(() => {
      due = false;
      port?.postMessage({ state: stateOf(model) });
    });
  };
  const answer = (message) => port?.postMessage(message);
  const heard = ({ data }) => {
    if (data.place !== undefined) model.send({ place: data.place });
    if (!data.state) return;
    const { tab, task, ...rest } = data.state;
    model.set("card", tab ?? "overview");
    model.set("task", task ?? null);
    const shared = SHARED.filter((name) => rest[name] !== undefined).map((name) => [name, rest[name]]);
    model.set("selection", Object.fromEntries(shared));
    model.save_changes();
  };
  frame.addEventListener("load", () => {
    port?.close();
    const channel = new MessageChannel();
    port = channel.port1;
    port.onmessage = heard;
    frame.contentWindow.postMessage("probe", "*", [channel.port2]);
    show();
  });
  size();
  model.on("change:height", size);
  for (const name of ["task", "card", "selection"]) model.on(`change:${name}`, show);
  model.on("msg:custom", answer);
  frame.srcdoc = model.get("_page");
  el.append(frame);
  return () => {
    port?.close();
    model.off("change:height", size);
    for (const name of ["task", "card", "selection"]) model.off(`change:${name}`, show);
    model.off("msg:custom", answer);
  };
}

export default { render };
