"use strict";
// Where the marks of an attribution graph stand: tokens along x, layers along y, the logits on top. As mtc.report.graph_svg.
const graphLayout = (() => {
  const MARK = 22, WIDEST = 130, LOW = 24, TALL = 38, GAP = 4, CHARACTER = 6.7, LEAST_LABEL = 34, MOST_LABEL = 124, LOGIT = 92, LEAST_HEIGHT = 340, MOST_APART = 40;

  // A text's width at 11 px, rather too large: what is drawn elsewhere has other fonts.
  function widthOf(text) {
    let width = 0;
    for (const c of text) width += /[\u1100-\uffdc]|[\u{1f000}-\u{3ffff}]/u.test(c) ? 2 : /[MWmw@%␣⏎⋯]/.test(c) ? 1.5 : /[iljftr.,:;'|! ()[\]]/.test(c) ? 0.65 : 1;
    return width * CHARACTER;
  }

  function shorten(text, width) {
    if (widthOf(text) <= width) return text;
    const characters = [...text];
    while (characters.length && widthOf(characters.join("")) + CHARACTER * 1.5 > width) characters.pop();
    return characters.join("").trimEnd() + "…";
  }

  // Row of a mark, from the embeddings' 0 to the logits' layers + 1.
  const rowOf = (mark, layers) => (mark.kind === "embedding" ? 0 : mark.layer === null ? layers + 1 : mark.layer + 1);

  // Slots of each token's column: as many as its fullest cell has, fewer where that is wider than the page.
  function columnsOf(cells, tokens, width) {
    const slots = tokens.map(() => 1);
    for (const row of cells.values()) for (const [token, marks] of row) slots[token] = Math.max(slots[token], marks.length);
    const labels = tokens.map((text) => Math.max(28, Math.min(width < 600 ? 52 : MOST_LABEL, widthOf(text) + 10)));
    const total = (pitch) => slots.reduce((sum, n, t) => sum + Math.max(n * pitch, labels[t]) + GAP, 0);
    while (total(MARK) > width && Math.max(...slots) > 2) slots[slots.indexOf(Math.max(...slots))]--;
    let pitch = WIDEST;
    while (pitch > MARK && total(pitch) > width) pitch--;
    const spare = Math.min(90, Math.max(0, (width - total(pitch)) / slots.length));
    let x = 0;
    const columns = slots.map((n, t) => {
      const column = { x, width: Math.max(n * pitch, labels[t]) + spare, slots: n };
      x += column.width + GAP;
      return column;
    });
    return { columns, pitch, total: x };
  }

  // Marks as { mark, x, y, label }, columns, rows as { row, y, top, bottom }, and the size. `labelOf` gives a mark's
  // text, '' for none; at most `most` marks get one, the strongest, and only where there is room.
  function place(marks, tokens, layers, width, most, labelOf) {
    const cells = new Map();
    for (const mark of marks) {
      const row = rowOf(mark, layers), cell = cells.get(row) ?? new Map();
      cells.set(row, cell);
      cell.set(mark.token, [...(cell.get(mark.token) ?? []), mark]);
    }
    const logits = [...(cells.get(layers + 1)?.values() ?? [])].flat();
    cells.delete(layers + 1);
    const { columns, pitch, total } = columnsOf(cells, tokens, width);
    const lines = [];  // of marks side by side, from the top
    // Logits take the whole width, so that their labels have room.
    const side = Math.max(1, Math.floor(Math.max(total, Math.min(width, 320)) / LOGIT)), high = Math.ceil(logits.length / side) || 1;
    const each = Math.max(1, Math.ceil(logits.length / high)), shift = high > 1 ? 0.5 : 0;
    logits.sort((a, b) => b.influence - a.influence);  // the strongest below, above the last token: others' edges go past it
    const broad = Math.max(total, (each + shift) * LOGIT), step = Math.min(broad / (each + shift), WIDEST + 24);
    for (let i = 0; i < high && logits.length; i++) {
      const many = logits.slice(i * each, (i + 1) * each);
      lines.unshift({ row: layers + 1, spots: many.map((mark, n) => ({ mark, x: broad - (n + 0.5 + (i % 2) * shift) * step })) });
    }
    for (let row = layers; row >= 0; row--) {
      const found = cells.get(row);
      if (!found) { lines.push({ row, spots: [] }); continue; }
      const height = Math.max(...[...found].map(([t, m]) => Math.ceil(m.length / columns[t].slots)));
      for (let line = height - 1; line >= 0; line--) {
        const spots = [];
        for (const [t, all] of found) {
          const own = columns[t], each = Math.ceil(all.length / Math.ceil(all.length / own.slots));
          const many = [...all].sort(byKind).slice(line * each, (line + 1) * each);
          const between = Math.min(pitch, own.width / Math.max(1, many.length));
          many.forEach((mark, n) => spots.push({ mark, x: own.x + own.width / 2 + (n - (many.length - 1) / 2) * between }));
        }
        lines.push({ row, spots });
      }
    }
    label(lines, most, broad, labelOf);
    const tall = (line) => line.spots.some((spot) => spot.label);
    const heights = lines.map((line) => (!line.spots.length ? GAP : tall(line) ? TALL : LOW)), filled = lines.filter((line) => line.spots.length).length;
    // Few lines stand farther apart, or edges would lie flat.
    const apart = Math.max(0, Math.min(MOST_APART, (LEAST_HEIGHT - heights.reduce((a, b) => a + b, 0)) / Math.max(1, filled)));
    let y = 6;
    const rows = new Map(), spots = [];
    for (const [n, line] of lines.entries()) {
      const height = heights[n] + (line.spots.length && line.row > 0 ? apart : 0);
      const above = line.row > layers && tall(line);  // edges reach logits from below
      for (const spot of line.spots) spots.push(Object.assign(spot, { y: y + (above ? 27 : 11), labelY: above ? -11 : 21 }));
      const row = rows.get(line.row) ?? { row: line.row, top: y, empty: !line.spots.length };
      row.bottom = y + height;
      rows.set(line.row, row);
      y += height;
    }
    return { spots, columns, rows: [...rows.values()], width: broad, height: y + 2 };
  }

  const ORDER = { error: 0, embedding: 1, logit: 1, feature: 2, group: 3, others: 4 };
  const byKind = (a, b) => ORDER[a.kind] - ORDER[b.kind] || (a.feature ?? 0) - (b.feature ?? 0) || (a.name < b.name ? -1 : 1);

  // Labels below the marks, above logits, in a band of their own: none may touch another.
  function label(lines, most, width, labelOf) {
    const all = lines.flatMap((line) => line.spots.map((spot) => ({ line, spot })));
    all.sort((a, b) => b.spot.mark.target - a.spot.mark.target || b.spot.mark.influence - a.spot.mark.influence);
    for (const { line, spot } of all) {
      spot.label = "";
      const text = most > 0 ? labelOf(spot.mark) : "";
      if (!text) continue;
      let left = 0, right = width;  // what is free around it
      for (const other of line.spots) {
        if (!other.taken) continue;
        if (other.x < spot.x) left = Math.max(left, other.x + other.taken);
        else if (other !== spot) right = Math.min(right, other.x - other.taken);
      }
      const room = 2 * Math.min(spot.x - left, right - spot.x, MOST_LABEL / 2 + 5) - 10;
      if (room < Math.min(LEAST_LABEL, widthOf(text))) continue;
      spot.label = shorten(text, room);
      spot.taken = widthOf(spot.label) / 2 + 5;
      most--;
    }
  }

  // An edge from below to above; within a column it goes aside, the farther the longer, and never through marks.
  function path(from, to) {
    const [x1, y1, x2, y2] = [from.x, from.y - 7, to.x, to.y + 7].map((v) => Math.round(v * 10) / 10);
    const rise = y1 - y2, near = Math.abs(x1 - x2) < 12 && rise > 60;
    const aside = near ? Math.min(44, 10 + rise * 0.06) * (from.mark.name.length % 2 ? 1 : -1) : 0;
    const pull = Math.max(10, rise * 0.42);
    return `M${x1} ${y1}C${x1 + aside} ${Math.round(y1 - pull)} ${x2 + aside} ${Math.round(y2 + pull)} ${x2} ${y2}`;
  }

  return { place, path, rowOf, widthOf, shorten };
})();
