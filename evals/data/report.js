"use strict";
// Sort a table by a column: numbers by data-v, texts by what is shown; what has no value comes last.
document.querySelectorAll("thead button").forEach((button) => {
  button.addEventListener("click", () => {
    const head = button.closest("th"), table = button.closest("table"), body = table.tBodies[0];
    const column = [...head.parentNode.children].indexOf(head);
    const first = head.classList.contains("text") ? "ascending" : "descending";
    const other = first === "ascending" ? "descending" : "ascending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    head.parentNode.querySelectorAll("th").forEach((th) => th.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const value = (row) => row.cells[column].dataset.v ?? "";
    const compare = (a, b) => {
      const x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      const difference = Number(x) - Number(y);
      return sign * (Number.isNaN(difference) ? x.localeCompare(y, "en", { numeric: true }) : difference);
    };
    [...body.rows].sort(compare).forEach((row) => body.append(row));
  });
});
// A number leads to its runs: the table of runs shows these alone.
const runs = document.getElementById("runs"), filter = document.getElementById("filter");
function show(ids) {
  runs.querySelectorAll("tbody tr").forEach((row) => { row.hidden = ids !== null && !ids.includes(row.dataset.run); });
  filter.hidden = ids === null;
  if (ids !== null) filter.querySelector("span").textContent = `${ids.length} of ${runs.querySelectorAll("tbody tr").length} runs`;
}
document.querySelectorAll("[data-runs]").forEach((link) => {
  link.addEventListener("click", () => show(link.dataset.runs.split(" ")));
});
filter.querySelector("button").addEventListener("click", () => show(null));
// A chip lights up one policy in the pictures of its section.
document.querySelectorAll(".chips button").forEach((chip) => {
  chip.addEventListener("click", () => {
    const on = chip.getAttribute("aria-pressed") !== "true", section = chip.closest("section");
    section.querySelectorAll(".chips button").forEach((other) => other.setAttribute("aria-pressed", "false"));
    chip.setAttribute("aria-pressed", String(on));
    section.querySelectorAll("[data-policy]:not(button)").forEach((part) => {
      part.classList.toggle("lit", on && part.dataset.policy === chip.dataset.policy);
      part.classList.toggle("dim", on && part.dataset.policy !== chip.dataset.policy);
    });
    section.querySelectorAll("figure[data-map]").forEach((map) => {
      map.hidden = on && map.dataset.map !== chip.dataset.policy;
    });
  });
});
