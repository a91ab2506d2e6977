// The address: what is open, what is searched, and the one selection that all panels share.

const ADDRESS = ["tab", "task", "q", "only", "sort", "down", "step", "tool", "layer", "head"];

const address = (() => {
  const listeners = [];
  /** A task names its tab by itself. */
  const named = (state) => {
    if (state.task !== undefined && state.tab === undefined) state.tab = "tasks";
    return state;
  };
  const read = () => {
    const state = {};
    for (const [name, value] of new URLSearchParams(location.hash.slice(1)))
      if (ADDRESS.includes(name)) state[name] = value;
    return named(state);
  };
  const fragment = (state) => {
    const kept = new URLSearchParams();
    for (const name of ADDRESS)
      if (state[name] !== undefined && !(name === "tab" && state.tab === "tasks" && state.task !== undefined))
        kept.set(name, state[name]);
    return `#${kept}`;
  };
  const merged = (changes) => {
    const state = { ...address.state };
    for (const [name, value] of Object.entries(changes))
      if (value === null || value === undefined || value === "") delete state[name];
      else state[name] = String(value);
    return named(state);
  };
  const tell = (state, before) => {
    const changed = ADDRESS.filter((name) => state[name] !== before[name]);
    if (changed.length) for (const listen of listeners) listen(changed);
  };
  let waiting = 0;
  const follow = (state) => {
    const before = address.state;
    address.state = state;
    tell(state, before);
  };
  const write = (keep) => {
    waiting = 0;
    try {
      history[keep ? "pushState" : "replaceState"](null, "", fragment(address.state));
    } catch {
      /* a browser that takes no more changes for now: the next one carries this one too */
    }
  };
  window.addEventListener("hashchange", () => follow(read()));
  window.addEventListener("popstate", () => follow(read()));
  return {
    state: read(),
    /** The link to a state that differs from this one by `changes`. */
    link: (changes) => fragment(merged(changes)),
    /** Change the state and tell those who listen; with `keep`, "back" returns to the one before. */
    set: (changes, keep = false) => {
      const before = address.state;
      const state = merged(changes);
      address.state = state;
      // Before anybody is told: a listener may replace this entry, never the entry before.
      write(keep && fragment(state) !== fragment(before));
      tell(state, before);
    },
    /** The same while somebody types: browsers refuse many changes a second. */
    typed: (changes) => {
      follow(merged(changes));
      clearTimeout(waiting);
      waiting = setTimeout(write, 250, false);
    },
    listen: (listener) => listeners.push(listener),
  };
})();

/** What leads to another state of the page: a link, or, with a plain click, a step without loading. */
function linkTo(changes, attributes, ...children) {
  const go = (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
    event.preventDefault();
    event.stopPropagation();
    address.set(changes, true);
  };
  return el("a", { ...attributes, href: address.link(changes), onclick: go }, ...children);
}

// -- the shared selection -------------------------------------------------------------------------------------------

/** Nodes that stand for a tool, a layer or a head have it as data; those of the selection are marked. */
function markSelection() {
  const { tool, layer, head } = address.state;
  for (const node of /** @type {NodeListOf<HTMLElement>} */ (document.querySelectorAll("[data-tool]")))
    node.classList.toggle("picked", node.dataset.tool === tool);
  for (const node of /** @type {NodeListOf<any>} */ (document.querySelectorAll("td.cell"))) {
    const place = node.go?.layer;
    if (place === undefined) continue;
    const ownHead = node.go?.head;
    const here = String(place) === layer && (ownHead === undefined || String(ownHead) === head);
    node.classList.toggle("picked", here);
  }
}

address.listen((changed) => {
  if (["tool", "layer", "head", "task", "tab"].some((name) => changed.includes(name)))
    requestAnimationFrame(markSelection);
});

for (const [kind, on] of /** @type {[string, boolean][]} */ ([
  ["pointerover", true],
  ["pointerout", false],
]))
  document.addEventListener(kind, (event) => {
    const named = /** @type {any} */ (event.target).closest?.("[data-tool]");
    if (!named) return;
    for (const node of /** @type {NodeListOf<HTMLElement>} */ (document.querySelectorAll("[data-tool]")))
      if (node.dataset.tool === named.dataset.tool) node.classList.toggle("linked", on);
  });

document.addEventListener("click", (event) => {
  const target = /** @type {any} */ (event.target);
  const cell = target.closest?.("td.cell");
  if (cell?.go) {
    address.set(cell.go, cell.go.tab !== undefined);
    return;
  }
  const named = target.closest?.("[data-tool]");
  if (!named || target.closest("a, button, summary, select")) return;
  if (String(getSelection())) return; // the reader marks text
  address.set({ tool: named.dataset.tool === address.state.tool ? null : named.dataset.tool });
});
