// The rows of a ranking: the table, examples of what is kept and dropped, near-duplicates side by side.
"use strict";
pharmacist.start(async (DataTable) => {
  const { data, element, readable, swatch, tableOptions, onSearch } = pharmacist;
  const [RANK, SCORE, REASON, SELECTED, LABEL, PROMPT, COMPLETION, ROW, DUPLICATE, HIDDEN] = Array(10).keys();
  const LONG = 240;
  const { table: { rows, reasons, labels }, examples, pairs } = await data("rows");

  // --- texts ---------------------------------------------------------------------------------------------------

  // Every second piece is what the other text of a pair does not have.
  const compared = (pieces) => pieces.flatMap((piece, at) => (at % 2 ? element("mark", {}, ...readable(piece)) : readable(piece)));
  const concealed = new WeakMap();
  const text = (row, column) => {
    const value = row[column];
    const pieces = Array.isArray(value);
    const length = pieces ? value.join("") : value;
    const body = element("div", { class: "text", dir: "auto" }, ...(pieces ? compared(value) : readable(value)));
    const box = element("div", { class: "box" }, body);
    const cell = element("div", { class: "cell" }, box);
    if (length.length > LONG || length.split("\n").length > 4) {
      box.classList.add("clamp");
      cell.append(element("button", { type: "button", class: "more", "aria-expanded": "false" }, "more"));
    }
    const bit = column === PROMPT ? 2 : 1;
    if (row[HIDDEN] & bit) {
      box.classList.add("concealed");
      concealed.set(box, { row, bit });
      box.setAttribute("role", "button");
      box.setAttribute("tabindex", "0");
      const what = column === PROMPT ? "prompt" : "completion";
      box.setAttribute("aria-label", `Hidden ${what} of row ${row[ROW]}, may be harmful: show it`);
      body.setAttribute("aria-hidden", "true");
      box.nextElementSibling?.setAttribute("hidden", "");
    }
    return cell;
  };
  const reveal = (box) => {
    const { row, bit } = concealed.get(box);
    row[HIDDEN] &= ~bit; // it stays so when the table is sorted or filtered
    box.classList.remove("concealed");
    for (const name of ["role", "tabindex", "aria-label"]) box.removeAttribute(name);
    box.firstElementChild.removeAttribute("aria-hidden");
    box.nextElementSibling?.removeAttribute("hidden");
  };
  const flip = (more) => {
    const open = more.previousElementSibling.classList.toggle("clamp");
    more.textContent = open ? "more" : "less";
    more.setAttribute("aria-expanded", String(!open));
  };
  document.addEventListener("click", (event) => {
    const box = event.target.closest(".concealed");
    const more = event.target.closest(".more");
    if (box) reveal(box);
    else if (more) flip(more);
  });
  document.addEventListener("keydown", (event) => {
    if (!event.target.classList.contains("concealed") || (event.key !== "Enter" && event.key !== " ")) return;
    event.preventDefault();
    reveal(event.target);
  });
  for (const button of document.querySelectorAll("[data-reveal]")) {
    button.addEventListener("click", () => document.querySelectorAll(`${button.dataset.reveal} .concealed`).forEach(reveal));
  }
  const figure = (value) => (value && Math.abs(value) < 0.1 ? value.toPrecision(3) : value.toFixed(3)).replaceAll("-", "\u2212");
  const key = (keys, value) => (value < 0 ? "" : element("span", { class: "key" }, swatch(keys[value].color), ...readable(keys[value].title)));
  const sample = (row) => element(
    "article", { class: "sample" },
    element(
      "header", {}, key(reasons, row[REASON]),
      element("span", {}, `rank ${row[RANK]} · score ${figure(row[SCORE])} · row ${row[ROW]}${row[SELECTED] ? " · selected" : ""}`),
    ),
    text(row, PROMPT), text(row, COMPLETION),
  );

  // --- examples ------------------------------------------------------------------------------------------------

  for (const [side, groups] of Object.entries(examples)) {
    document.getElementById(side).append(...groups.flatMap((group) => [element("h4", {}, ...readable(group.title)), ...group.rows.map(sample)]));
  }

  // --- near-duplicates -----------------------------------------------------------------------------------------

  if (pairs.shown) {
    new DataTable("#pairs", {
      ...tableOptions([
        { title: "Ranks higher", render: (_, type, pair) => (type === "display" ? sample(pair[0]) : "") },
        { title: "Says nearly the same", render: (_, type, pair) => (type === "display" ? sample(pair[1]) : "") },
      ].map((column) => ({ ...column, data: null, orderable: false })), "pairs"),
      data: pairs.pairs, ordering: false, pageLength: 3, lengthMenu: [3, 10, 30],
    });
  }

  // --- the table -----------------------------------------------------------------------------------------------

  const shows = (draw) => (value, type, row) => (type === "display" ? draw(value, row) : value);
  const words = (column) => shows((_, row) => text(row, column));
  // DataTables shows one page; which rows are on it is worked out here, on whole numbers, so that 100 000 rows answer at
  // once. `places[column][row]` is the row's place among all of them by that column; equals share one.
  const everyRow = Uint32Array.from(rows.keys());
  const lower = { [PROMPT]: [], [COMPLETION]: [] };
  const lowered = (column, row) => (lower[column][row] ??= rows[row][column].toLowerCase());
  const places = [];
  const placesOf = (column) => {
    if (places[column]) return places[column];
    const value = column in lower ? (row) => lowered(column, row) : (row) => rows[row][column];
    const values = Array.from(everyRow, value);
    const sorted = everyRow.slice().sort((a, b) => (values[a] < values[b] ? -1 : values[a] > values[b] ? 1 : 0));
    const found = new Uint32Array(rows.length);
    sorted.forEach((row, at) => {
      found[row] = at && values[row] === values[sorted[at - 1]] ? found[sorted[at - 1]] : at;
    });
    return (places[column] = found);
  };
  // A counting sort, which keeps the former order among equals.
  const arranged = (found, place, down) => {
    const key = down ? (row) => rows.length - 1 - place[row] : (row) => place[row];
    const starts = new Uint32Array(rows.length + 1);
    for (const row of found) starts[key(row) + 1] += 1;
    for (let at = 1; at < starts.length; at += 1) starts[at] += starts[at - 1];
    const sorted = new Uint32Array(found.length);
    for (const row of found) sorted[starts[key(row)]++] = row;
    return sorted;
  };
  const shown = new Set();
  const choice = { chosen: "", label: "" };
  let wanted = [];
  const passes = (index) => {
    const row = rows[index];
    if (shown.size && !shown.has(row[REASON])) return false;
    if (choice.chosen !== "" && row[SELECTED] !== Number(choice.chosen)) return false;
    if (choice.label !== "" && row[LABEL] !== Number(choice.label)) return false;
    return wanted.every((word) => lowered(PROMPT, index).includes(word) || lowered(COMPLETION, index).includes(word));
  };
  let matching = everyRow;
  const page = ({ draw, start, length, order, columns }, show) => {
    const sorted = order.reduceRight((found, { column, dir }) => arranged(found, placesOf(columns[column].data), dir === "desc"), matching);
    const data = Array.from(sorted.subarray(start, start + length), (row) => rows[row]);
    show({ draw, recordsTotal: rows.length, recordsFiltered: matching.length, data });
  };
  document.querySelector("#table tbody").replaceChildren();
  const table = new DataTable("#table", {
    ...tableOptions([
      { title: "Rank", data: RANK, type: "num", className: "figure" },
      { title: "Score", data: SCORE, type: "num", className: "figure", render: shows(figure) },
      { title: "Reason", data: REASON, type: "num", className: "dt-left", render: shows((value) => key(reasons, value)) },
      {
        title: "Selected", data: SELECTED, type: "num", className: "dt-left",
        render: shows((value) => element("span", { class: value ? "yes" : "no" }, value ? "✓ yes" : "no")),
      },
      ...(labels.length
        ? [{ title: "Label", data: LABEL, type: "num", className: "dt-left", render: shows((value) => key(labels, value)) }]
        : []),
      { title: "Prompt", data: PROMPT, type: "string", className: "words", render: words(PROMPT) },
      { title: "Completion", data: COMPLETION, type: "string", className: "words", render: words(COMPLETION) },
      { title: "Row", data: ROW, type: "num", className: "figure row-number" },
      { title: "Repeats row", data: DUPLICATE, type: "num", className: "figure repeats", render: shows((value) => (value < 0 ? "" : value)) },
    ], "rows"),
    serverSide: true, ajax: page, pageLength: 25, lengthMenu: [10, 25, 50, 100], order: [[0, "asc"]],
  });
  const redraw = () => {
    matching = everyRow.filter(passes);
    table.draw();
  };

  onSearch(document.getElementById("search"), (words) => {
    wanted = words;
    redraw();
  });
  for (const name of Object.keys(choice)) {
    document.getElementById(name)?.addEventListener("change", (event) => {
      choice[name] = event.target.value;
      redraw();
    });
  }
  const counts = reasons.map(() => 0);
  for (const row of rows) counts[row[REASON]] += 1;
  reasons.forEach((reason, index) => {
    const chip = element(
      "button", { type: "button", "aria-pressed": "false", "data-reason": reason.name },
      swatch(reason.color), ...readable(reason.title), element("small", {}, counts[index].toLocaleString("en").replaceAll(",", "\u202f")),
    );
    chip.addEventListener("click", () => {
      if (!shown.delete(index)) shown.add(index);
      chip.setAttribute("aria-pressed", String(shown.has(index)));
      redraw();
    });
    document.getElementById("reasons").append(chip);
  });
  document.getElementById("filters").hidden = false;
  // While nobody waits, so that the first search and the first sort of a large pool are as fast as the others.
  const whenIdle = globalThis.requestIdleCallback ?? setTimeout;
  const prepare = (from) => {
    const to = Math.min(rows.length, from + 5000);
    for (let row = from; row < to; row += 1) for (const column of [PROMPT, COMPLETION]) lowered(column, row);
    if (to < rows.length) whenIdle(() => prepare(to));
    else placeNext(RANK);
  };
  const placeNext = (column) => {
    placesOf(column);
    if (column < DUPLICATE) whenIdle(() => placeNext(column + 1));
  };
  whenIdle(() => prepare(0));
});
