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
filter?.querySelector("button").addEventListener("click", () => show(null));
// A policy is lit while a pointer or the focus is on its button or its marks, and stays so once its button is pressed.
const config = JSON.parse(document.getElementById("config").textContent);
document.querySelectorAll("section").forEach((section) => {
  const chips = [...section.querySelectorAll(".chips button")], views = [];
  function light(policy) {
    const lit = policy || chips.find((chip) => chip.getAttribute("aria-pressed") === "true")?.dataset.policy || "";
    views.forEach((view) => view.signal("lit", lit).runAsync());
    section.querySelectorAll("[data-policy]").forEach((part) => part.classList.toggle("lit", part.dataset.policy === lit));
  }
  chips.forEach((chip) => {
    chip.addEventListener("click", () => {
      const on = chip.getAttribute("aria-pressed") !== "true";
      chips.forEach((other) => other.setAttribute("aria-pressed", String(on && other === chip)));
      section.querySelectorAll("figure[data-map]").forEach((map) => { map.hidden = on && map.dataset.map !== chip.dataset.policy; });
      light("");
    });
    for (const event of ["pointerenter", "focus"]) chip.addEventListener(event, () => light(chip.dataset.policy));
    for (const event of ["pointerleave", "blur"]) chip.addEventListener(event, () => light(""));
  });
  section.querySelectorAll("[data-chart]").forEach(async (place) => {
    const chart = JSON.parse(place.nextElementSibling.textContent);
    const { view } = await vegaEmbed(place, chart, { mode: "vega-lite", renderer: "svg", actions: false, config, tooltip: { theme: "custom" } });
    views.push(view);
    view.addEventListener("mouseover", (event, item) => light(item?.datum?.policy ?? ""));
    view.addEventListener("mouseout", () => light(""));
    view.addEventListener("click", (event, item) => {
      if (!item?.datum?.runs || event.pointerType === "touch") return; // a touch shows what a pointer shows
      show(item.datum.runs);
      runs.scrollIntoView();
    });
  });
});
