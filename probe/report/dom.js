"use strict";

// Elements and numbers. Text enters the page as text nodes only: what a model wrote is data, never markup.

/** An element. Attributes: `onclick` and the like are listeners, `--name` a custom property, false is absent. */
function el(name, attributes, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key.startsWith("--")) node.style.setProperty(key, value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(
    ...children.flat(2).filter((child) => child !== null && child !== undefined && child !== false),
  );
  return node;
}

/** A head of a column; one without text is no head, so that nothing reads out an empty one. */
function headCell(text, kind = "") {
  return el(text === "" || text === null ? "td" : "th", { class: kind }, text);
}

/** What may be wider than the page: scrolled by pointer or, when it has the focus, by keys. */
function scrollBox(...children) {
  return el("div", { class: "scroll", tabindex: 0 }, ...children);
}

/** A table of cells under its head; columns from `numeric` on hold numbers. */
function plainTable(head, rows, numeric = 1, kind = "lines") {
  const align = (index) => (index >= numeric ? "num" : "");
  const headRow = el(
    "tr",
    null,
    head.map((text, index) => headCell(text, align(index))),
  );
  const bodyRows = rows.map((cells) =>
    el(
      "tr",
      null,
      cells.map((cell, index) => el("td", { class: align(index) }, cell)),
    ),
  );
  return scrollBox(
    el("table", { class: `plain ${kind}` }, el("thead", null, headRow), el("tbody", null, bodyRows)),
  );
}

/** Three significant digits; what was not measured is a dash, never 0. */
function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "string") return value; // an infinity
  if (value === 0) return "0";
  const size = Math.abs(value);
  let text;
  if (size < 1e-4) text = value.toExponential(1).replace("e-", "e−");
  else if (size >= 1000) text = Math.round(value).toLocaleString("en-US");
  else text = value.toPrecision(digits);
  return text.replace(/^-/, "−");
}

/** A whole number, with all of its digits. */
function count(value) {
  return value === null || value === undefined ? "–" : Math.round(value).toLocaleString("en-US");
}

/** A number with its sign, for changes. */
function change(value) {
  return typeof value === "number" && value > 0 ? `+${number(value)}` : number(value);
}

/** Probabilities to four places, so that columns align; a small one is not shown as 0. */
function probability(value) {
  if (value === null || value === undefined) return "–";
  return value > 0 && value < 5e-5 ? number(value) : value.toFixed(4);
}

function percent(value) {
  return value === null || value === undefined ? "–" : `${Math.round(100 * value)}\u00a0%`;
}

function bytes(value) {
  if (value === null || value === undefined) return "–";
  for (const unit of ["B", "kB", "MB"]) {
    if (value < 1000) return `${unit === "B" ? value : value.toPrecision(3)} ${unit}`;
    value /= 1000;
  }
  return `${value.toPrecision(3)} GB`;
}

function interval(low, high, show = number) {
  return low === null || low === undefined ? "" : `${show(low)} to ${show(high)}`;
}

/** The interval in a sentence. */
function within(low, high, show = number) {
  return interval(low, high, show) ? `95 % ${interval(low, high, show)}` : "no interval";
}

function plural(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

/** What the page holds. */
const PAGE = JSON.parse(document.getElementById("data").textContent);
