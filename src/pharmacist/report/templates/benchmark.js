// The table of a benchmark, and the choice of what its charts show.
"use strict";
pharmacist.start(async (DataTable) => {
  const { data, element, readable, swatch, tableOptions, onSearch, choose } = pharmacist;
  const { columns, rows } = await data("results");
  document.getElementById("setting")?.addEventListener("change", (event) => choose(Number(event.target.value)));

  const plain = (value, digits, sign) => `${sign && value > 0 ? "+" : ""}${value.toFixed(digits)}`.replace(/^-(?=[0.]+$)/, "").replace("-", "\u2212");
  const interval = (low, high, digits) => (low === null ? [] : [element("span", { class: "interval" }, `${plain(low, digits)} to ${plain(high, digits)}`)]);
  const draw = {
    name: (value) => element("span", {}, ...readable(value)),
    series: ([name, color]) => element("span", { class: "key" }, swatch(color), ...readable(name)),
    mean: ([mean, low, high], digits) => element("span", { class: "estimate" }, element("span", {}, plain(mean, digits)), ...interval(low, high, digits)),
    difference: ([mean, low, high, p, verdict], digits) => {
      const real = verdict === 1 || verdict === -1;
      const title = p === null ? "nothing to test: no spread over seeds" : `corrected p = ${p.toPrecision(2)}`;
      const made = element("span", { class: "estimate", title }, element(real ? "strong" : "span", {}, plain(mean, digits, true)), ...interval(low, high, digits));
      if (real) made.append(element("span", { class: verdict === 1 ? "better" : "worse" }, verdict === 1 ? "better" : "worse"));
      return made;
    },
  };
  const key = { name: (value) => value, series: (value) => value[0], mean: (value) => value[0], difference: (value) => value[0] };
  const render = (kind, digits) => (value, type) => {
    if (value === null) return type === "display" ? "" : Number.NEGATIVE_INFINITY;
    return type === "display" ? draw[kind](value, digits) : key[kind](value);
  };
  const named = columns.flatMap(({ kind }, at) => (kind === "name" || kind === "series" ? [at] : []));
  const names = rows.map((row) => named.map((at) => key[columns[at].kind](row[at])).join("\n").toLowerCase());
  const scores = columns.flatMap(({ kind, metric }, at) => (kind === "difference" && metric === "harmful_score" ? [at] : []));
  let wanted = [];
  const real = document.getElementById("real");
  const passes = (_, row, index) => (!real.checked || scores.some((at) => row[at]?.[4])) && wanted.every((word) => names[index].includes(word));
  document.querySelector("#table tbody").replaceChildren();
  const table = new DataTable("#table", {
    ...tableOptions(columns.map(({ title, kind, digits }, at) => ({
      title: element("span", {}, ...readable(title)).innerHTML, data: at, // DataTables takes titles for HTML
      render: render(kind, digits), type: kind === "name" || kind === "series" ? "string" : "num",
      className: kind === "name" || kind === "series" ? "dt-left" : "figure",
    })), "cells"),
    data: rows, pageLength: 25, lengthMenu: [10, 25, 50, 100], order: [], scrollX: false,
  });
  table.search.fixed("filters", passes);
  onSearch(document.getElementById("search"), (words) => {
    wanted = words;
    table.draw();
  });
  real.addEventListener("change", () => table.draw());
  if (!scores.length) real.closest(".choices").hidden = true;
  document.getElementById("filters").hidden = false;
});
