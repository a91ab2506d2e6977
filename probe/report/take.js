// What every figure gives away: its numbers as a table, to copy or as CSV, itself as SVG or PNG, and the whole screen.

const NUMBERS_SHOWN = 400; // rows of the numbers that are drawn; copies and files hold all

/** The words of a cell; a plain number has a minus that spreadsheets know. */
function cellText(text) {
  const plain = text.replace(/\s+/g, " ").trim();
  return /^[−+]?[\d.,]+(e[−+]?\d+)?$/.test(plain)
    ? plain.replaceAll("−", "-").replace(/^\+|,(?=\d{3})/g, "")
    : plain;
}

/** [what a cell says large, what it says small]: a value, and its interval or note. */
function cellParts(cell) {
  const small = [...cell.querySelectorAll("small")].map((part) => part.textContent);
  const large = cell.cloneNode(true);
  for (const part of large.querySelectorAll("small")) part.remove();
  return [cellText(large.textContent), cellText(small.join(" "))];
}

/** The rows of a table; a column in which a cell has a note beside its value becomes two. */
function rowsOf(table) {
  const rows = [...table.rows].map((row) => [...row.cells].map(cellParts));
  const wide = Math.max(0, ...rows.map((row) => row.length));
  const noted = Array.from({ length: wide }, (_, column) =>
    rows.some((row) => row[column]?.[0] && row[column][1]),
  );
  return rows
    .map((row) =>
      row.flatMap(([large, small], column) => (noted[column] ? [large, small] : [large || small])),
    )
    .filter((row) => row.some(Boolean));
}

/** Every table of a figure, and the numbers of what is painted or drawn as points: [title, rows of cells]. */
function tablesOf(place) {
  const tables = [...place.querySelectorAll("table")]
    .filter((table) => !table.closest(".taken"))
    .map((table) => [titleOf(table, place), rowsOf(table)]);
  for (const drawn of place.querySelectorAll("canvas, .tokens"))
    if (drawn.numbers)
      tables.push([drawn.getAttribute("aria-label") ?? titleOf(drawn, place), drawn.numbers()]);
  // Where numbers are folded away below the plots, they are those of the plots.
  if (!place.querySelector("details.numbers"))
    for (const drawn of place.querySelectorAll(".plot"))
      tables.push([drawn.querySelector("h4")?.textContent ?? "", drawn.numbers()]);
  for (const list of place.querySelectorAll("dl.readings"))
    tables.push([titleOf(list, place), [...list.children].map(readingRow)]);
  return tables;
}

/** Name, value and note of a single number. */
function readingRow(entry) {
  return [entry.querySelector("dt").textContent, ...cellParts(entry.querySelector("dd"))];
}

/** The nearest heading in front of a table. */
function titleOf(table, place) {
  const heads = [...place.querySelectorAll("h3, h4, h5")].filter(
    (head) => head.compareDocumentPosition(table) & Node.DOCUMENT_POSITION_FOLLOWING,
  );
  return heads.length ? heads[heads.length - 1].textContent : "";
}

/** Comma-separated values; a text that a spreadsheet would run gets an apostrophe. */
function csvOf(tables) {
  const cell = (value) => {
    const text = String(value ?? "");
    const safe = /^[=+\-@\t\r\n]/.test(text) && !/^-[\d.]/.test(text) ? `'${text}` : text;
    return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  return tables
    .map(([title, rows]) => [[title], ...rows].map((row) => row.map(cell).join(",")).join("\n"))
    .join("\n\n")
    .concat("\n");
}

/** Put a file into the reader's downloads. */
function saveAs(name, blob) {
  const link = el("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function fileName(place, ending) {
  const words = [
    PAGE.run.title,
    address.state.tab === "tasks" ? address.state.task : "",
    place.querySelector("h3")?.textContent,
  ];
  const name = words
    .filter(Boolean)
    .join(" ")
    .replace(/[^\p{L}\p{N}]+/gu, "-")
    .replace(/^-|-$/g, "");
  return `${name.slice(0, 80).toLowerCase() || "figure"}.${ending}`;
}

async function copyText(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = el("textarea", null, text);
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const before = button.textContent;
  button.textContent = "copied";
  setTimeout(() => {
    button.textContent = before;
  }, 1500);
}

function numbersPanel(place) {
  const tables = tablesOf(place);
  const csv = csvOf(tables);
  const copy = el("button", { type: "button", onclick: () => copyText(csv, copy) }, "copy");
  return el(
    "div",
    { class: "taken" },
    el(
      "div",
      { class: "figtools" },
      copy,
      el(
        "button",
        {
          type: "button",
          onclick: () => saveAs(fileName(place, "csv"), new Blob([csv], { type: "text/csv" })),
        },
        "CSV",
      ),
    ),
    tables.map(([title, rows]) => [
      title && el("p", { class: "how" }, title),
      scrollBox(
        el(
          "table",
          { class: "plain" },
          el(
            "tbody",
            null,
            rows.slice(0, NUMBERS_SHOWN).map((row) =>
              el(
                "tr",
                null,
                row.map((text) => el("td", null, String(text ?? ""))),
              ),
            ),
          ),
        ),
      ),
      rows.length > NUMBERS_SHOWN &&
        el("p", { class: "caution" }, `${rows.length - NUMBERS_SHOWN} more rows: copy or CSV holds them.`),
    ]),
  );
}

const NUMBERED = "table, canvas, .plot, .tokens, dl.readings"; // what a figure of texts alone has none of

/** Give each figure below `place` its tools, once. */
function equip(place) {
  for (const figure_ of place.querySelectorAll("figure")) {
    if (figure_.querySelector(":scope > .figtools")) continue;
    const title = figure_.querySelector("h3")?.textContent ?? "figure";
    const tool = (text, say, onclick) =>
      el("button", { type: "button", "aria-label": `${say}: ${title}`, onclick }, text);
    const numbers = tool("numbers", "numbers", () => {
      const open = figure_.querySelector(":scope > .taken");
      numbers.setAttribute("aria-expanded", String(!open));
      if (open) open.remove();
      else figure_.querySelector(":scope > .figtools").after(numbersPanel(figure_));
    });
    numbers.setAttribute("aria-expanded", "false");
    figure_.prepend(
      el(
        "div",
        { class: "figtools" },
        figure_.querySelector(NUMBERED) && numbers,
        tool("SVG", "save as SVG", () =>
          saveAs(fileName(figure_, "svg"), new Blob([svgOf(figure_)], { type: "image/svg+xml" })),
        ),
        tool("PNG", "save as PNG", () =>
          pngOf(figure_).toBlob((blob) => saveAs(fileName(figure_, "png"), blob)),
        ),
        tool("⤢", "full screen", () =>
          document.fullscreenElement ? document.exitFullscreen() : figure_.requestFullscreen?.(),
        ),
      ),
    );
  }
}
