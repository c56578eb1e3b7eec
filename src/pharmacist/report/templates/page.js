// What every page has: its data, theme and charts, and the library for its tables.
"use strict";
const pharmacist = (() => {
  const root = document.documentElement;
  const data = async (name) => {
    const block = document.getElementById(`data-${name}`);
    const packed = block.textContent;
    block.remove(); // the text of a large pool is not kept twice
    const bytes = Uint8Array.fromBase64?.(packed) ?? Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
  };

  // --- theme ---------------------------------------------------------------------------------------------------

  const system = matchMedia("(prefers-color-scheme: dark)");
  const asked = new URLSearchParams(location.search).get("theme");
  let chosen = asked === "dark" || asked === "light" ? asked : null;
  const button = document.getElementById("theme");
  const dark = () => (chosen ?? (system.matches ? "dark" : "light")) === "dark";
  const applyTheme = () => {
    root.style.colorScheme = chosen ?? "";
    root.classList.toggle("dark", dark()); // what DataTables looks at
    button.textContent = dark() ? "Light" : "Dark";
    button.setAttribute("aria-label", dark() ? "Light colours" : "Dark colours");
    button.setAttribute("aria-pressed", String(dark()));
  };
  button.addEventListener("click", () => {
    chosen = dark() ? "light" : "dark";
    applyTheme();
    drawAll();
  });
  system.addEventListener("change", () => {
    applyTheme();
    drawAll();
  });

  // --- charts --------------------------------------------------------------------------------------------------

  // A chart is one figure, or a list of them, one per choice in the page's select.
  let figures = {};
  let setting = 0;
  const probe = document.createElement("span");
  probe.hidden = true;
  document.body.append(probe);
  const color = (value) => {
    probe.style.color = value;
    return getComputedStyle(probe).color;
  };
  // Plotly does not know CSS variables: every "var(--name)" becomes the colour that it now stands for.
  const resolved = (value, known) => {
    if (typeof value === "string" && value.startsWith("var(--")) return (known[value] ??= color(value));
    if (Array.isArray(value)) return value.map((item) => resolved(item, known));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolved(item, known)]));
  };
  const plots = [...document.querySelectorAll("[data-figure]")];
  const drawAll = (width) => {
    const known = {};
    for (const plot of plots) {
      const found = figures[plot.dataset.figure];
      if (!found) continue; // not unpacked yet
      const figure = resolved(Array.isArray(found) ? found[setting] : found, known);
      if (plot.clientWidth < 480) figure.layout.margin.l = Math.min(figure.layout.margin.l, 48);
      const size = width ? { width: plot.closest(".pair") ? width / 2 - 16 : width, autosize: false } : {};
      Plotly.react(plot, figure.data, { ...figure.layout, ...size }, { displayModeBar: false, responsive: true });
    }
  };
  const choose = (index) => {
    setting = index;
    drawAll();
  };
  applyTheme();
  let before = null;
  addEventListener("beforeprint", () => {
    before = chosen;
    chosen = "light";
    applyTheme();
    drawAll(690); // about what fits on paper
  });
  addEventListener("afterprint", () => {
    chosen = before;
    applyTheme();
    drawAll();
  });

  // --- tables --------------------------------------------------------------------------------------------------

  const element = (tag, attributes = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  };
  // Marks that turn text around or cannot be seen are spelled out; joiners, which scripts and emoji need, are not.
  const MARKS = /(?![\t\n\r\u200c\u200d])[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu;
  const readable = (text) => {
    const parts = [];
    let from = 0;
    for (const match of text.matchAll(MARKS)) {
      const code = match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
      parts.push(text.slice(from, match.index), element("span", { class: "mark" }, `U+${code}`));
      from = match.index + match[0].length;
    }
    return [...parts, text.slice(from)];
  };
  const swatch = (color) => {
    const made = element("span", { class: "swatch" });
    made.style.background = color;
    return made;
  };
  const library = async () => {
    const url = URL.createObjectURL(new Blob([await data("datatables")], { type: "text/javascript" }));
    const { default: DataTable } = await import(url);
    URL.revokeObjectURL(url);
    return DataTable;
  };
  // Of every table. DataTables' own search would put raw text into an element to decode it; ours only compares strings.
  const tableOptions = (columns, what) => ({
    columns: columns.map((column) => ({ ...column, searchable: false })), autoWidth: false, deferRender: true,
    orderClasses: false, layout: { topStart: null, topEnd: null, bottomStart: ["pageLength", "info"], bottomEnd: "paging" },
    language: {
      info: `_START_ to _END_ of _TOTAL_ ${what}`, infoEmpty: `no ${what}`, infoFiltered: "(out of _MAX_)",
      lengthMenu: "_MENU_ per page", thousands: "\u202f", zeroRecords: "Nothing matches; widen search or filters.",
      emptyTable: "Nothing to show.",
    },
  });
  const onSearch = (input, apply) => {
    let pause;
    input.addEventListener("input", () => {
      clearTimeout(pause);
      pause = setTimeout(() => apply(input.value.toLowerCase().split(/\s+/).filter(Boolean)), 20);
    });
  };
  const start = async (tables) => {
    figures = await data("figures");
    drawAll();
    await new Promise((resolve) => setTimeout(resolve)); // charts are painted before tables are made
    await tables(await library());
    root.dataset.ready = "true";
  };
  return { data, element, readable, swatch, tableOptions, onSearch, choose, start };
})();
