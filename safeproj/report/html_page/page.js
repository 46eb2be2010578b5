"use strict";
// The page is complete without this script but for the charts: it draws them, moves tau, chooses the
// adapter, and makes tables sort and filter. It only ever writes text, never markup.
(() => {
  const record = JSON.parse(document.getElementById("record").textContent);
  const printed = matchMedia("print");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const PAPER = 680; // pixels that fit on the width of A4 and of US letter
  const TALL = 880; // and their height, less a caption
  const FOLLOWS = new Set(["curve", "heatmap"]); // figures that tau changes
  let tau = record.tau;

  // --- charts

  function theme() {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    return {
      page: colour("page"), text: colour("text"), line: colour("line"), mark: colour("mark"),
      series: colour("series").split(/\s+/),
    };
  }

  function colourLines(traces, colours) {
    for (const trace of traces) {
      const own = colours.series[trace.meta % colours.series.length];
      trace.line.color = own;
      trace.marker.color = own;
    }
  }

  const FINISH = {
    curve(figure, colours) {
      colourLines(figure.data, colours);
      for (const trace of figure.data) {
        const below = trace.y.map((cosine) => cosine <= tau);
        const { symbol, color } = trace.marker;
        const dense = below.length > 150; // outlines would cover the markers beside them
        trace.marker = {
          symbol: below.map((marked) => (marked ? symbol : `${symbol}-open`)),
          size: below.map((marked) => (marked ? 10 : 6) - (dense ? 3 : 0)),
          color: below.map((marked) => (marked ? colours.mark : color)),
          line: { color: below.map((marked) => (marked && dense ? colours.mark : color)), width: 1.5 },
          opacity: 1,
        };
      }
      Object.assign(figure.layout.shapes[0], { y0: tau, y1: tau });
      figure.layout.shapes[0].line.color = colours.mark;
      figure.layout.annotations = [{
        text: `tau ${tau}`, x: 1, xref: "paper", xanchor: "right", y: tau, yanchor: "bottom",
        showarrow: false, font: { color: colours.mark },
      }];
    },
    heatmap(figure, colours) {
      const [cells, marks, numbers] = figure.data;
      const { layout } = figure;
      if (printed.matches) layout.height = Math.min(layout.height, TALL);
      cells.z.forEach((row, y) => row.forEach((cosine, x) => {
        if (cosine === null || cosine > tau) return;
        marks.x.push(x - 0.4);
        marks.y.push(y);
      }));
      const rowHeight = (layout.height - 120) / cells.z.length;
      layout.yaxis.tickfont = { size: Math.min(13, rowHeight) };
      numbers.textfont.size = Math.min(11, rowHeight - 2);
      numbers.textfont.color = numbers.textfont.color.map(
        (ink, i) => (numbers.text[i] === "n/a" ? colours.text : ink), // on the page, on no cell
      );
      numbers.visible = (layout.width - 260) / cells.z[0].length > 26; // the table has them, too
    },
    measure(figure, colours) {
      colourLines(figure.data, colours);
    },
    tradeoff(figure, colours) {
      colourLines(figure.data.filter(({ meta }) => meta !== undefined), colours);
      for (const trace of figure.data) {
        if (trace.meta === undefined) trace.marker.color = trace.marker.line.color = colours.mark;
      }
      for (const shape of figure.layout.shapes) shape.line.color = colours.mark;
      for (const note of figure.layout.annotations) {
        Object.assign(note, { font: { color: colours.mark }, arrowcolor: colours.mark });
        if (note.showarrow !== false) note.visible = figure.layout.width > 560; // the page says it
      }
    },
  };

  function draw({ id, kind, data, layout }) {
    const place = document.getElementById(id);
    if (!place.clientWidth) return; // of an adapter that is not shown
    const colours = theme();
    const figure = structuredClone({ data, layout });
    const room = printed.matches ? PAPER : place.clientWidth;
    Object.assign(figure.layout, {
      width: Math.min(room, layout.meta ?? room),
      paper_bgcolor: colours.page,
      plot_bgcolor: colours.page,
      font: { color: colours.text, size: 13 },
      hoverlabel: {
        bgcolor: colours.page, bordercolor: colours.text, font: { color: colours.text },
        align: "left",
      },
    });
    for (const axis of [figure.layout.xaxis, figure.layout.yaxis]) {
      Object.assign(axis, { gridcolor: colours.line, zerolinecolor: colours.line });
    }
    FINISH[kind](figure, colours);
    Plotly.react(place, figure.data, figure.layout, {
      displayModeBar: false, displaylogo: false, showSendToCloud: false, showEditInChartStudio: false,
      showTips: false, typesetMath: false,
    });
  }

  // --- figures as files

  function save(name, type, content) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([content], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000); // some browsers read it later
  }

  function cell(value) {
    if (typeof value !== "string") return value === null ? "" : String(value);
    const safe = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value; // no formula of a spreadsheet
    return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  }

  // Plotly.toImage decodes entities that are text, so that some names would end in no XML.
  function drawing(place) {
    const layers = [...place.querySelectorAll("svg.main-svg")].map((layer) => layer.cloneNode(true));
    const [whole, ...above] = layers;
    const paper = document.createElementNS(whole.namespaceURI, "rect");
    Object.entries({ width: "100%", height: "100%", fill: theme().page })
      .forEach(([name, value]) => paper.setAttribute(name, value));
    whole.prepend(paper);
    whole.append(...above.flatMap((layer) => [...layer.childNodes]));
    whole.removeAttribute("style");
    whole.querySelectorAll(".draglayer, .zoomlayer, .hoverlayer").forEach((each) => each.remove());
    return new XMLSerializer().serializeToString(whole);
  }

  const SAVE = {
    SVG({ id }) {
      save(`safeproj-${id}.svg`, "image/svg+xml", drawing(document.getElementById(id)));
    },
    CSV({ id, rows }) {
      const lines = rows.map((row) => `${row.map(cell).join(",")}\r\n`);
      save(`safeproj-${id}.csv`, "text/csv", lines.join(""));
    },
  };

  function makeSavable(figure) {
    const bar = document.createElement("p");
    bar.className = "control";
    bar.append("Save this figure:", ...Object.keys(SAVE).map((kind) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = kind;
      button.addEventListener("click", () => SAVE[kind](figure));
      return button;
    }));
    document.getElementById(figure.id).after(bar);
  }

  const due = new Set();
  function drawSoon(figures = record.figures) {
    if (!due.size) requestAnimationFrame(() => {
      const waiting = [...due];
      due.clear();
      waiting.forEach(draw);
    });
    figures.forEach((figure) => due.add(figure));
  }

  // --- tau

  function count({ name, cosines }) {
    const projected = cosines.filter((cosine) => cosine <= tau).length;
    const line = document.createElement("span");
    const head = document.querySelectorAll("section.adapter").length > 1 ? `${name}: ` : "";
    line.textContent =
      `${head}would project ${projected} of ${cosines.length} modules with a cosine`;
    return line;
  }

  function showTau() {
    const head = document.createElement("strong");
    head.textContent = `tau ${tau}`;
    const lines = record.adapters.flatMap((adapter) => [" ", count(adapter)]);
    document.getElementById("tau-output").replaceChildren(head, ...lines);
    document.getElementById("tau").setAttribute("aria-valuetext", String(tau));
    for (const row of document.querySelectorAll("tr[data-cosine]")) {
      const below = Number(row.dataset.cosine) <= tau;
      row.classList.toggle("at-tau", below);
      row.querySelector(".tau").textContent = below ? "yes" : "";
    }
    drawSoon(record.figures.filter(({ kind }) => FOLLOWS.has(kind)));
  }

  // --- adapters

  function choose(index) {
    for (const section of document.querySelectorAll("section.adapter")) {
      section.hidden = section.id !== `adapter-${index}`;
    }
    drawSoon();
  }

  // --- tables

  function key(row, column) {
    const cell = row.cells[column];
    return cell.dataset.order === undefined ? cell.textContent : Number(cell.dataset.order);
  }

  function compare(a, b) {
    if (typeof a === "number" && typeof b === "number") return a - b;
    return String(a).localeCompare(String(b), "en", { numeric: true });
  }

  function sort(table, column, direction) {
    const keyed = [...table.tBodies[0].rows].map((row) => [key(row, column), row]);
    keyed.sort(([a], [b]) => {
      if (a === "" || b === "") return (a === "") - (b === ""); // nothing comes last either way
      return direction * compare(a, b);
    });
    table.tBodies[0].append(...keyed.map(([, row]) => row));
  }

  function makeSortable(table) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      head.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach((each) => each.setAttribute("aria-sort", "none"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        sort(table, column, up ? 1 : -1);
      });
    });
  }

  function makeFilterable(table) {
    const rows = [...table.tBodies[0].rows];
    const bar = document.createElement("p");
    const label = document.createElement("label");
    const input = document.createElement("input");
    const shown = document.createElement("output");
    bar.className = "control";
    shown.className = "rows";
    input.type = "search";
    input.id = `${table.id}-filter`;
    label.htmlFor = shown.htmlFor = input.id;
    label.textContent = `Filter: ${table.caption.textContent}`;
    input.addEventListener("input", () => {
      const wanted = input.value.trim().toLowerCase();
      for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
      const left = rows.filter((row) => !row.hidden).length;
      shown.textContent = `${left} of ${rows.length} rows`;
    });
    bar.append(label, input, shown);
    table.closest(".scroll").before(bar);
  }

  // --- start

  document.documentElement.classList.add("script");
  for (const table of document.querySelectorAll("table.tools")) {
    makeSortable(table);
    const short = table.tBodies[0].rows.length <= 3 || table.matches(".stacked");
    if (!short) makeFilterable(table);
  }
  record.figures.forEach(makeSavable);
  const slider = document.getElementById("tau");
  slider?.addEventListener("input", () => {
    tau = Number(slider.value);
    showTau();
  });
  const select = document.getElementById("adapter");
  select?.addEventListener("change", () => choose(select.value));
  if (select) choose(select.value);
  if (slider) showTau();
  drawSoon();
  dark.addEventListener("change", () => drawSoon());
  addEventListener("resize", () => drawSoon());
  // The sheet is laid out right after these events, so that a frame later would be too late.
  printed.addEventListener("change", () => record.figures.forEach(draw));
})();
