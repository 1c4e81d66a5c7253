"use strict";
// Sort a table by the column whose title is clicked, and filter rows by the words typed above them.
(() => {
  const text = (row, index) => row.cells[index].textContent.trim();
  const compare = (a, b) => {
    const x = Number(a), y = Number(b);
    if (a !== "" && b !== "" && !Number.isNaN(x) && !Number.isNaN(y)) return x - y;
    return a.localeCompare(b, "en", { numeric: true });
  };
  for (const table of document.querySelectorAll("table")) {
    const titles = [...table.tHead.rows[0].cells];
    titles.forEach((title, index) => title.querySelector("button").addEventListener("click", () => {
      const down = title.getAttribute("aria-sort") === "ascending";
      for (const other of titles) other.removeAttribute("aria-sort");
      title.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows];
      const blank = (row) => text(row, index) === "-";
      rows.sort((a, b) => blank(a) - blank(b) || (down ? -1 : 1) * compare(text(a, index), text(b, index)));
      table.tBodies[0].append(...rows);
    }));
  }
  for (const filter of document.querySelectorAll(".filter")) {
    const input = filter.querySelector("input"), output = filter.querySelector("output");
    const list = filter.nextElementSibling;
    const rows = list.matches(".groups") ? [...list.children] : [...list.querySelector("tbody").rows];
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        const content = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => content.includes(word));
        if (!row.hidden) shown += 1;
      }
      output.textContent = words.length ? `${shown} of ${rows.length}` : "";
    });
  }
})();
