// Draws the charts and the table of rows, and switches the theme.
"use strict";
(() => {
  const root = document.documentElement;
  const data = (name) => {
    const element = document.getElementById(`data-${name}`);
    const value = JSON.parse(element.textContent);
    element.remove(); // the text of a large pool is not kept twice
    return value;
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

  const figures = data("figures");
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
      const figure = resolved(figures[plot.dataset.figure], known);
      if (plot.clientWidth < 480) figure.layout.margin.l = Math.min(figure.layout.margin.l, 48);
      const size = width ? { width: plot.closest(".pair") ? width / 2 - 16 : width, autosize: false } : {};
      Plotly.react(plot, figure.data, { ...figure.layout, ...size }, { displayModeBar: false, responsive: true });
    }
  };
  applyTheme();
  drawAll();
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

  // --- rows ----------------------------------------------------------------------------------------------------

  const [RANK, SCORE, REASON, SELECTED, LABEL, PROMPT, COMPLETION, ROW, DUPLICATE, VEIL] = Array(10).keys();
  const LONG = 240;
  // Marks that turn text around or cannot be seen are spelled out.
  const MARKS = /[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;

  const element = (tag, attributes = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  };
  const swatch = (key) => {
    const made = element("span", { class: "swatch" });
    made.style.background = key.color;
    return made;
  };
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
  const reveal = (veil) => {
    veil.classList.remove("veil");
    for (const name of ["role", "tabindex", "aria-label"]) veil.removeAttribute(name);
    veil.firstElementChild.removeAttribute("aria-hidden");
    veil.nextElementSibling?.removeAttribute("hidden");
  };

  const startTable = async () => {
    const { rows, reasons, labels } = data("rows");
    const source = new Blob([data("datatables")], { type: "text/javascript" });
    const url = URL.createObjectURL(source);
    const { default: DataTable } = await import(url);
    URL.revokeObjectURL(url);

    const text = (hidden, what) => (value, type, row) => {
      if (type !== "display") return value;
      const body = element("div", { class: "text", dir: "auto" }, ...readable(value));
      const box = element("div", { class: "box" }, body);
      const cell = element("div", { class: "cell" }, box);
      if (value.length > LONG || value.split("\n").length > 4) {
        box.classList.add("clamp");
        cell.append(element("button", { type: "button", class: "more", "aria-expanded": "false" }, "more"));
      }
      if (row[VEIL] & hidden) {
        box.classList.add("veil");
        box.setAttribute("role", "button");
        box.setAttribute("tabindex", "0");
        box.setAttribute("aria-label", `Hidden ${what} of row ${row[ROW]}, may be harmful: show it`);
        body.setAttribute("aria-hidden", "true");
        box.nextElementSibling?.setAttribute("hidden", "");
      }
      return cell;
    };
    const key = (keys) => (value, type) => {
      if (type !== "display") return value;
      return value < 0 ? "" : element("span", { class: "key" }, swatch(keys[value]), keys[value].title);
    };
    const tick = (value, type) => {
      if (type !== "display") return value;
      return element("span", { class: value ? "yes" : "no" }, value ? "✓ yes" : "no");
    };
    const number = (digits) => (value, type) => (type === "display" ? value.toFixed(digits).replace("-", "\u2212") : value);
    const orNothing = (value, type) => (type === "display" && value < 0 ? "" : value);
    const columns = [
      { title: "Rank", data: RANK, type: "num", className: "figure" },
      { title: "Score", data: SCORE, type: "num", className: "figure", render: number(3) },
      { title: "Reason", data: REASON, type: "num", className: "dt-left", render: key(reasons) },
      { title: "Selected", data: SELECTED, type: "num", className: "dt-left", render: tick },
      ...(labels.length ? [{ title: "Label", data: LABEL, type: "num", className: "dt-left", render: key(labels) }] : []),
      { title: "Prompt", data: PROMPT, type: "string", className: "words", render: text(2, "prompt") },
      { title: "Completion", data: COMPLETION, type: "string", className: "words", render: text(1, "completion") },
      { title: "Row", data: ROW, type: "num", className: "figure row-number" },
      { title: "Repeats row", data: DUPLICATE, type: "num", className: "figure repeats", render: orNothing },
    ].map((column) => ({ ...column, searchable: false }));
    // DataTables' own search would put raw text into an element to decode it; ours only ever compares strings.
    const lower = [];
    let wanted = [];
    const shown = new Set();
    const choice = { chosen: "", label: "" };
    const passes = (_, row, index) => {
      if (shown.size && !shown.has(row[REASON])) return false;
      if (choice.chosen !== "" && row[SELECTED] !== Number(choice.chosen)) return false;
      if (choice.label !== "" && row[LABEL] !== Number(choice.label)) return false;
      if (!wanted.length) return true;
      const words = (lower[index] ??= `${row[PROMPT]}\n${row[COMPLETION]}`.toLowerCase());
      return wanted.every((word) => words.includes(word));
    };
    document.querySelector("#table tbody").replaceChildren();
    const table = new DataTable("#table", {
      data: rows, columns, autoWidth: false, deferRender: true, pageLength: 25, lengthMenu: [10, 25, 50, 100],
      order: [[0, "asc"]], orderClasses: false,
      layout: { topStart: null, topEnd: null, bottomStart: ["pageLength", "info"], bottomEnd: "paging" },
      language: {
        info: "_START_ to _END_ of _TOTAL_ rows", infoEmpty: "no rows", infoFiltered: "(out of _MAX_)",
        lengthMenu: "_MENU_ rows per page", thousands: "\u202f", zeroRecords: "No row matches; widen search or filters.",
      },
    });
    table.search.fixed("filters", passes);
    const redraw = () => table.draw();

    const node = table.table().node();
    const flip = (more) => {
      const open = more.previousElementSibling.classList.toggle("clamp");
      more.textContent = open ? "more" : "less";
      more.setAttribute("aria-expanded", String(!open));
    };
    node.addEventListener("click", (event) => {
      const veil = event.target.closest(".veil");
      const more = event.target.closest(".more");
      if (veil) reveal(veil);
      else if (more) flip(more);
    });
    node.addEventListener("keydown", (event) => {
      if (!event.target.classList.contains("veil") || (event.key !== "Enter" && event.key !== " ")) return;
      event.preventDefault();
      reveal(event.target);
    });
    document.getElementById("reveal").addEventListener("click", () => node.querySelectorAll(".veil").forEach(reveal));

    let pause;
    document.getElementById("search").addEventListener("input", (event) => {
      clearTimeout(pause);
      pause = setTimeout(() => {
        wanted = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
        redraw();
      }, 120);
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
        swatch(reason), reason.title, element("small", {}, counts[index].toLocaleString("en").replaceAll(",", "\u202f")),
      );
      chip.addEventListener("click", () => {
        if (!shown.delete(index)) shown.add(index);
        chip.setAttribute("aria-pressed", String(shown.has(index)));
        redraw();
      });
      document.getElementById("reasons").append(chip);
    });
    document.getElementById("filters").hidden = false;
    root.dataset.ready = "true";
  };
  setTimeout(startTable); // after the charts are painted
})();
