// Adds searching and sorting to what reads well without: a field for each [data-search], a button in each th[data-sort].
for (const list of document.querySelectorAll("[data-search]")) {
  const field = document.createElement("input");
  field.type = "search"; field.placeholder = list.dataset.search; field.setAttribute("aria-label", list.dataset.search);
  field.addEventListener("input", () => {
    const wanted = field.value.trim().toLowerCase();
    for (const item of list.children) item.hidden = !(item.dataset.name || "").toLowerCase().includes(wanted);
  });
  list.before(field);
}
for (const head of document.querySelectorAll("th[data-sort]")) {
  const button = document.createElement("button");
  button.append(...head.childNodes); head.append(button);
  button.addEventListener("click", () => {
    const body = head.closest("table").tBodies[0], place = head.cellIndex;
    const down = head.getAttribute("aria-sort") !== "descending", key = row => row.cells[place].dataset.value;
    const order = (a, b) => head.dataset.sort === "number" ? key(a) - key(b) : key(a).localeCompare(key(b));
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...[...body.rows].sort((a, b) => down ? order(b, a) : order(a, b)));
  });
}
