// One row at a time, hidden until asked for; what a person says of it is kept in the browser and saved as labels.json.
"use strict";
(async () => {
  const { data, readable } = pharmacist;
  const { pool, labels, rows, known } = await data("labelling");
  const at = (name) => document.getElementById(`label-${name}`);
  const [card, texts, progress, revealing] = ["card", "texts", "progress", "reveal"].map(at);
  const place = `pharmacist-labels:${pool}`;
  const names = new Set(labels.map(({ name }) => name));

  // --- what is known -------------------------------------------------------------------------------------------

  const found = new Map(known); // row -> label; of other rows too, so that one file holds all labels of the pool
  const saves = () => {
    at("unsaved").hidden = false;
  };
  try {
    const kept = JSON.parse(localStorage.getItem(place) ?? "[]");
    for (const [row, label] of kept) if (Number.isInteger(row) && names.has(label)) found.set(row, label);
  } catch {
    saves();
  }
  const keep = () => {
    try {
      localStorage.setItem(place, JSON.stringify([...found]));
    } catch {
      saves();
    }
  };

  // --- one row -------------------------------------------------------------------------------------------------

  const past = []; // places of the rows that were labelled or skipped
  const skipped = new Set();
  let current = 0;
  let shown = false;
  const next = () => rows.findIndex(([row], index) => !found.has(row) && !skipped.has(index));
  const draw = () => {
    const row = rows[current];
    const done = rows.filter(([number]) => found.has(number)).length;
    const left = rows.length - done;
    shown = false;
    texts.classList.add("hidden");
    texts.hidden = !row;
    for (const [name, column] of [["prompt", 1], ["completion", 2]]) {
      at(name).setAttribute("aria-hidden", "true");
      at(name).replaceChildren(...(row ? readable(row[column]) : []));
    }
    progress.textContent = row
      ? `${done} of ${rows.length} labelled · row ${row[0]} of the pool`
      : left ? `${done} of ${rows.length} labelled, ${left} skipped` : `All ${rows.length} labelled`;
    at("bar").value = done;
    at("count").textContent = `${found.size} ${found.size === 1 ? "label" : "labels"} of this pool`;
    at("download").disabled = !found.size;
    for (const button of card.querySelectorAll("[data-label]")) button.disabled = true;
    revealing.disabled = !row && !left;
    revealing.firstChild.data = row ? "Show the row" : left ? "Go through the skipped rows" : "Show the row";
    at("skip").disabled = !row;
    at("undo").disabled = !past.length;
  };
  const go = (index) => {
    current = index;
    draw();
    card.focus({ preventScroll: true }); // a button that was pressed would take the space bar for itself
  };
  const reveal = () => {
    if (!rows[current]) {
      skipped.clear();
      past.length = 0;
      go(next());
      return;
    }
    shown = true;
    texts.classList.remove("hidden");
    for (const name of ["prompt", "completion"]) at(name).removeAttribute("aria-hidden");
    for (const button of card.querySelectorAll("[data-label]")) button.disabled = false;
    revealing.disabled = true;
    card.focus({ preventScroll: true });
  };
  const answer = (label) => {
    if (!shown) return; // nobody labels what they have not seen
    found.set(rows[current][0], label);
    keep();
    past.push(current);
    go(next());
  };
  const skip = () => {
    if (!rows[current]) return;
    skipped.add(current);
    past.push(current);
    go(next());
  };
  const undo = () => {
    if (!past.length) return;
    const index = past.pop();
    skipped.delete(index);
    found.delete(rows[index][0]);
    keep();
    go(index);
  };

  // --- keys and buttons ----------------------------------------------------------------------------------------

  const actions = { " ": () => !revealing.disabled && reveal(), s: skip, u: undo };
  for (const { name, key } of labels) actions[key] = () => answer(name);
  card.addEventListener("keydown", (event) => {
    const key = event.key.toLowerCase();
    const pressed = event.target !== card && key === " "; // the space bar presses a button that has the focus
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || pressed || !Object.hasOwn(actions, key)) return;
    event.preventDefault();
    actions[key]();
  });
  card.addEventListener("click", (event) => {
    if (event.target.closest("#label-texts.hidden")) reveal();
  });
  revealing.addEventListener("click", reveal);
  at("skip").addEventListener("click", skip);
  at("undo").addEventListener("click", undo);
  for (const button of card.querySelectorAll("[data-label]")) {
    button.addEventListener("click", () => answer(button.dataset.label));
  }
  at("download").addEventListener("click", () => {
    const content = [...found].sort(([a], [b]) => a - b).map(([row, label]) => ({ row, label }));
    const text = `${JSON.stringify({ pool, labels: content }, null, 2)}\n`;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = "labels.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  });
  current = next();
  draw();
})();
