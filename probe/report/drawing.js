// A figure as a picture: what the page shows of it, read from its layout as rectangles, polygons and lines of text.

const SVG = "http://www.w3.org/2000/svg";
const LEFT_OUT = ".figtools, .controls, .readout, .taken, .unseen, button, select, details, [hidden]";

/** Any CSS color as [red, green, blue, alpha]. */
const colorOf = (() => {
  const known = new Map();
  const brush = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  return (text) => {
    if (!known.has(text)) {
      brush.clearRect(0, 0, 1, 1);
      brush.fillStyle = "#000";
      brush.fillStyle = text;
      brush.fillRect(0, 0, 1, 1);
      const [red, green, blue, alpha] = brush.getImageData(0, 0, 1, 1).data;
      known.set(text, [red, green, blue, Number((alpha / 255).toFixed(3))]);
    }
    return known.get(text);
  };
})();

/** Where a polygon of the plots has its corners, in pixels of its box. */
function cornersOf(shape, box) {
  const pairs = [...shape.matchAll(/calc\(([-\d.]+)%\s*\+\s*([-\d.]+)px\)|([-\d.]+)%/g)].map(
    ([, share, more, plain]) => [Number(share ?? plain) / 100, Number(more ?? 0)],
  );
  const corners = [];
  for (let index = 0; index + 1 < pairs.length; index += 2)
    corners.push([
      box.left + pairs[index][0] * box.width + pairs[index][1],
      box.top + pairs[index + 1][0] * box.height + pairs[index + 1][1],
    ]);
  return corners;
}

/** What a figure shows: parts {kind, …} in pixels from its own corner, in the order in which they are painted. */
function partsOf(root) {
  const left = /** @type {HTMLElement[]} */ ([
    ...root.querySelectorAll(".taken, .controls, .readout, details"),
  ]).filter((node) => !node.hidden);
  for (const node of left) node.hidden = true; // so that they leave no gap
  const parts = shownParts(root);
  for (const node of left) node.hidden = false;
  return parts;
}

function shownParts(root) {
  const origin = root.getBoundingClientRect();
  const brush = document.createElement("canvas").getContext("2d");
  const parts = [];
  const placed = (rect) => ({
    left: rect.left - origin.left,
    top: rect.top - origin.top,
    width: rect.width,
    height: rect.height,
  });
  const fill = (box, color, opacity, radius = 0) => {
    if (colorOf(color)[3] > 0 && box.width > 0 && box.height > 0)
      parts.push({ kind: "rect", ...box, color, opacity, radius });
  };
  const visit = (node, opacity) => {
    if (node.nodeType === Node.TEXT_NODE) return lines(node, opacity);
    if (node.nodeType !== Node.ELEMENT_NODE || (node !== root && node.matches(LEFT_OUT))) return;
    const style = getComputedStyle(node);
    if (style.display === "none" || style.visibility === "hidden") return;
    opacity *= Number(style.opacity);
    const box = placed(node.getBoundingClientRect());
    if (node.tagName === "CANVAS") parts.push({ kind: "image", ...box, canvas: node });
    else if (node.matches(".band, .stroke"))
      parts.push({
        kind: "polygon",
        corners: cornersOf(node.style.getPropertyValue("--shape"), box),
        color: style.backgroundColor,
        opacity,
      });
    else if (node.matches(".diagonal"))
      parts.push({
        kind: "line",
        from: [box.left, box.top + box.height],
        to: [box.left + box.width, box.top],
        color: style.getPropertyValue("--neutral"),
        opacity,
      });
    else surfaceOf(node, style, box, opacity);
    for (const child of node.childNodes) visit(child, opacity);
  };
  const surfaceOf = (node, style, box, opacity) => {
    if (node.matches(".legend i"))
      for (let step = 0; step < 32; step++)
        fill(
          { ...box, left: box.left + (step * box.width) / 32, width: box.width / 32 + 0.5 },
          `color-mix(in oklab, ${style.getPropertyValue("--heat-high")} ${(100 * step) / 31}%, ${style.getPropertyValue("--heat-low")})`,
          opacity,
        );
    const corner = Number.parseFloat(style.borderTopLeftRadius) || 0;
    const border = style.borderTopStyle === "none" ? 0 : Number.parseFloat(style.borderTopWidth);
    // The border of a round box is what its paint leaves of a larger one.
    const ringed = corner > 4 && border > 0 && colorOf(style.backgroundColor)[3] === 1;
    if (ringed) fill(box, style.borderTopColor, opacity, Math.min(corner, box.height / 2));
    const inner = ringed
      ? {
          left: box.left + border,
          top: box.top + border,
          width: box.width - 2 * border,
          height: box.height - 2 * border,
        }
      : box;
    fill(inner, style.backgroundColor, opacity, Math.min(corner, inner.height / 2));
    if (style.backgroundImage.includes("gradient")) {
      if (node.matches(".track div"))
        fill({ ...box, top: box.top + box.height / 2, height: 1 }, style.getPropertyValue("--line"), opacity);
      else if (node.matches(".signed"))
        fill(
          { ...box, left: box.left + box.width / 2, width: 1 },
          style.getPropertyValue("--neutral"),
          opacity,
        );
      else if (!node.matches(".legend i")) fill(box, style.getPropertyValue("--line"), opacity * 0.6);
    }
    for (const [side, edge] of /** @type {[string, (width: number) => any][]} */ ([
      ["Top", (width) => ({ ...box, height: width })],
      ["Bottom", (width) => ({ ...box, top: box.top + box.height - width, height: width })],
      ["Left", (width) => ({ ...box, width })],
      ["Right", (width) => ({ ...box, left: box.left + box.width - width, width })],
    ])) {
      const width = Number.parseFloat(style[`border${side}Width`]);
      if (width > 0 && style[`border${side}Style`] !== "none" && !(corner > 4))
        fill(edge(width), style[`border${side}Color`], opacity);
    }
  };
  /** A text node line by line: words of one height belong together. */
  const lines = (node, opacity) => {
    if (!node.data.trim()) return;
    const style = getComputedStyle(node.parentElement);
    const range = document.createRange();
    const clip = placed((node.parentElement.closest("td, th, .scroll, pre") ?? root).getBoundingClientRect());
    brush.font = `${style.fontStyle} ${style.fontWeight} ${style.fontSize} ${style.fontFamily}`;
    const { fontBoundingBoxAscent: ascent, fontBoundingBoxDescent: descent } = brush.measureText("x");
    let line = null;
    for (const word of node.data.matchAll(/\S+\s*/g)) {
      range.setStart(node, word.index);
      range.setEnd(node, word.index + word[0].length);
      const rect = range.getClientRects()[0];
      if (!rect || rect.width < 0.5) continue;
      const box = placed(rect);
      if (box.top > clip.top + clip.height + 2 || box.top + box.height < clip.top - 2) continue;
      if (line && Math.abs(line.top - box.top) < 2) line.text += word[0];
      else {
        line = {
          kind: "text",
          text: word[0],
          left: box.left,
          top: box.top,
          base: box.top + (box.height * ascent) / (ascent + descent),
          font: brush.font,
          color: style.color,
          opacity,
        };
        parts.push(line);
      }
    }
  };
  visit(root, 1);
  const ends = parts.flatMap((part) =>
    part.width === undefined ? [] : [[part.left + part.width, part.top + part.height]],
  );
  return {
    parts,
    width: Math.ceil(Math.max(origin.width, ...ends.map(([right]) => right))),
    height: Math.ceil(Math.max(...ends.map(([, bottom]) => bottom), origin.height)),
    paper: getComputedStyle(document.documentElement).getPropertyValue("--paper").trim(),
  };
}

/** The figure as the text of an SVG file: shapes and letters, so that they can be edited. */
function svgOf(root) {
  const { parts, width, height, paper } = partsOf(root);
  const escaped = (text) =>
    String(text).replace(
      /[&<>"]/g,
      (sign) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[sign],
    );
  const at = (value) => Number(value.toFixed(2));
  const paint = (color, opacity) => {
    const [red, green, blue, alpha] = colorOf(color);
    return `fill="rgb(${red},${green},${blue})"${alpha * opacity < 1 ? ` fill-opacity="${at(alpha * opacity)}"` : ""}`;
  };
  const drawn = parts.map((part) => {
    if (part.kind === "rect")
      return `<rect x="${at(part.left)}" y="${at(part.top)}" width="${at(part.width)}" height="${at(part.height)}"${part.radius ? ` rx="${at(part.radius)}"` : ""} ${paint(part.color, part.opacity)}/>`;
    if (part.kind === "polygon")
      return `<polygon points="${part.corners.map(([x, y]) => `${at(x)},${at(y)}`).join(" ")}" ${paint(part.color, part.opacity)}/>`;
    if (part.kind === "line")
      return `<path d="M${part.from.map(at)} L${part.to.map(at)}" ${paint(part.color, part.opacity).replaceAll("fill", "stroke")}/>`;
    if (part.kind === "image")
      return `<image x="${at(part.left)}" y="${at(part.top)}" width="${at(part.width)}" height="${at(part.height)}" href="${part.canvas.toDataURL()}"/>`;
    return `<text x="${at(part.left)}" y="${at(part.base)}" style="font: ${escaped(part.font.replaceAll('"', "'"))}" xml:space="preserve" ${paint(part.color, part.opacity)}>${escaped(part.text.trimEnd())}</text>`;
  });
  const background = `<rect width="${width}" height="${height}" ${paint(paper, 1)}/>`;
  return `<svg xmlns="${SVG}" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}">\n${[background, ...drawn].join("\n")}\n</svg>\n`;
}

/** The figure on a canvas, two pixels for one of the page. */
function pngOf(root) {
  const { parts, width, height, paper } = partsOf(root);
  const canvas = el("canvas", { width: 2 * width, height: 2 * height });
  const brush = canvas.getContext("2d");
  brush.scale(2, 2);
  brush.fillStyle = paper;
  brush.fillRect(0, 0, width, height);
  for (const part of parts) {
    brush.globalAlpha = part.opacity ?? 1;
    brush.fillStyle = brush.strokeStyle = part.color ?? "#000";
    brush.beginPath();
    if (part.kind === "rect") {
      brush.roundRect(part.left, part.top, part.width, part.height, part.radius);
      brush.fill();
    } else if (part.kind === "polygon") {
      for (const [x, y] of part.corners) brush.lineTo(x, y);
      brush.fill();
    } else if (part.kind === "line") {
      brush.moveTo(...part.from);
      brush.lineTo(...part.to);
      brush.stroke();
    } else if (part.kind === "image")
      brush.drawImage(part.canvas, part.left, part.top, part.width, part.height);
    else {
      brush.font = part.font;
      brush.fillText(part.text.trimEnd(), part.left, part.base);
    }
  }
  return canvas;
}
