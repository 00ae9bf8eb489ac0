// Adds searching, sorting and looking closer to what reads well without: a field for each [data-search] and for the maps, a
// button in each th[data-sort], the picture behind a point of each [data-map].
const search = (place, title, found) => { // found(text) tells whether a name is wanted
  const field = document.createElement("input");
  field.type = "search"; field.placeholder = title; field.setAttribute("aria-label", title);
  field.addEventListener("input", () => {
    const wanted = field.value.trim().toLowerCase();
    found(name => (name || "").toLowerCase().includes(wanted));
  });
  place.before(field);
};
for (const list of document.querySelectorAll("[data-search]")) search(list, list.dataset.search, wanted => {
  for (const item of list.children) item.hidden = !wanted(item.dataset.name);
});
const dots = document.querySelectorAll("[data-map] circle");
if (dots.length) search(document.querySelector("[data-map]"), "Show a class", wanted => {
  for (const dot of dots) dot.classList.toggle("unwanted", !wanted(dot.dataset.label));
});
for (const head of document.querySelectorAll("th[data-sort]")) {
  const button = document.createElement("button");
  button.append(...head.childNodes); head.append(button);
  button.addEventListener("click", () => {
    const body = head.closest("table").tBodies[0], place = head.cellIndex;
    const number = head.dataset.sort === "number", sorted = head.getAttribute("aria-sort"); // first the largest, or A to Z
    const down = number ? sorted !== "descending" : sorted === "ascending", key = row => row.cells[place].dataset.value;
    const order = (a, b) => number ? key(a) - key(b) : key(a).localeCompare(key(b), undefined, { numeric: true });
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...[...body.rows].sort((a, b) => down ? order(b, a) : order(a, b)));
  });
}
for (const map of document.querySelectorAll("[data-map]")) {
  const svg = map.querySelector("svg"), points = [...svg.querySelectorAll("circle")], peek = document.createElement("div");
  const places = points.map(point => [point.cx.baseVal.value, point.cy.baseVal.value]);
  let chosen = -1;
  peek.className = "peek"; peek.hidden = true; peek.setAttribute("aria-live", "polite"); map.append(peek); map.tabIndex = 0;
  map.setAttribute("role", "group"); map.setAttribute("aria-label", svg.getAttribute("aria-label") + ", arrow keys walk through it");
  for (const point of points) point.querySelector("title").remove();
  const line = (kind, text) => { const part = document.createElement(kind); part.textContent = text; return part; };
  const choose = number => {
    if (number === chosen) return;
    chosen = number; peek.hidden = number < 0;
    for (const point of points) point.classList.remove("chosen", "faded");
    if (number < 0) return;
    const point = points[number], seen = point.dataset;
    for (const other of points) other.classList.toggle("faded", other.dataset.label !== seen.label);
    point.classList.add("chosen"); svg.append(point); peek.replaceChildren();
    const source = seen.image || document.querySelector(`circle[data-image][data-row="${seen.row}"]`)?.dataset.image;
    if (source) { const image = new Image(); image.src = source; image.alt = ""; peek.append(image); }
    peek.append(line("b", seen.label));
    if (seen.taken) peek.append(line("span", "taken for " + seen.taken));
    const scale = svg.clientWidth / 1000, left = places[number][0] * scale, top = places[number][1] * scale;
    peek.style.left = Math.max(0, Math.min(left - peek.offsetWidth / 2, map.clientWidth - peek.offsetWidth)) + "px";
    peek.style.top = (top > peek.offsetHeight + 14 ? top - peek.offsetHeight - 12 : top + 14) + "px";
  };
  const near = event => {
    const box = svg.getBoundingClientRect(), scale = 1000 / box.width;
    const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
    let best = -1, least = (28 * scale) ** 2;
    places.forEach(([a, b], number) => { const d = (a - x) ** 2 + (b - y) ** 2; if (d < least) { least = d; best = number; } });
    choose(best);
  };
  map.addEventListener("pointermove", near); map.addEventListener("pointerdown", near);
  map.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") choose(-1); });
  map.addEventListener("blur", () => choose(-1));
  map.addEventListener("keydown", event => {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (event.key === "Escape") return choose(-1);
    if (!way) return;
    event.preventDefault();
    if (chosen < 0) return choose(0);
    const [x, y] = places[chosen];
    let best = chosen, least = Infinity;  // the nearest in that direction, sideways steps costing more
    places.forEach(([a, b], number) => {
      const ahead = (a - x) * way[0] + (b - y) * way[1], aside = Math.abs((a - x) * way[1] + (b - y) * way[0]);
      if (number !== chosen && ahead > 0 && ahead + 3 * aside < least) { least = ahead + 3 * aside; best = number; }
    });
    choose(best);
  });
}
