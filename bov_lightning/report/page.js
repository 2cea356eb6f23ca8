"use strict";

// Tables: a click on a column's name sorts by it, a second click the other way round.
// Cells without a value stay last.
for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement;
    const column = head.cellIndex;
    const body = head.closest("table").tBodies[0];
    const descending = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const numeric = head.classList.contains("number");
    const keyed = [...body.rows].map((row) => [row.cells[column].dataset.value, row]);
    keyed.sort(([a], [b]) => {
      if (a === "" || b === "") return (a === "") - (b === "");
      const order = numeric ? a - b : a.localeCompare(b, "en", { numeric: true });
      return descending ? -order : order;
    });
    body.append(...keyed.map(([, row]) => row));
  });
}

// Legends: a click hides a row's lines in all plots of its section; pointing at it brings them out.
for (const legend of document.querySelectorAll(".legend")) {
  const section = legend.parentElement;
  const marks = (row) => section.querySelectorAll(`svg g[data-row="${row}"]`);
  const show = (button, visible) => {
    button.setAttribute("aria-pressed", visible);
    for (const mark of marks(button.dataset.row)) mark.style.display = visible ? "" : "none";
  };
  const rows = [...legend.querySelectorAll("[data-row]")];
  for (const button of rows) {
    button.addEventListener("click", () => {
      show(button, button.getAttribute("aria-pressed") === "false");
    });
    const emphasise = (on) => {
      for (const figure of section.querySelectorAll("figure")) figure.classList.toggle("emphasis", on);
      for (const mark of marks(button.dataset.row)) mark.classList.toggle("chosen", on);
    };
    for (const event of ["pointerenter", "focus"]) button.addEventListener(event, () => emphasise(true));
    for (const event of ["pointerleave", "blur"]) button.addEventListener(event, () => emphasise(false));
  }
  for (const button of legend.querySelectorAll("[data-all]")) {
    button.addEventListener("click", () => {
      for (const row of rows) show(row, button.dataset.all === "true");
    });
  }
}
