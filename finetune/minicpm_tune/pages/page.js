"use strict";
// Everything here only hides, moves to, or enlarges what the page holds already.
document.documentElement.classList.add("js");
const find = (selector, root = document) => root.querySelector(selector);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

function rowsAndFilters() {
  const form = find(".filters");
  const rows = all("#rows article");
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  let group = "";

  function apply() {
    const value = (name) => (form.elements[name] ? form.elements[name].value.trim() : "");
    const least = value("least") === "" ? 0 : Number(value("least"));
    const most = value("most") === "" ? Infinity : Number(value("most"));
    const wanted = value("text").toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const tokens = Number(row.dataset.tokens);
      const fits =
        (!group || row.dataset.groups.split(" ").includes(group)) &&
        (!value("problem") || row.dataset.problem === value("problem")) &&
        (!value("source") || row.dataset.source === value("source")) &&
        tokens >= least && tokens <= most &&
        (!wanted || texts.get(row).includes(wanted));
      row.hidden = !fits;
      shown += fits;
    }
    find("output", form).textContent = shown === rows.length ? `${shown} rows` : `${shown} of ${rows.length} rows`;
    find(".nothing").hidden = shown > 0;
  }

  function choose(name) {
    group = name;
    for (const button of all("[data-group]", form)) {
      button.setAttribute("aria-pressed", String(button.dataset.group === name));
    }
    apply();
  }

  function showAll() {
    form.reset();
    choose("");
  }

  function move(step) {
    const shown = rows.filter((row) => !row.hidden);
    if (!shown.length) return;
    const current = shown.indexOf(document.activeElement && document.activeElement.closest("article"));
    const place = current < 0 ? (step > 0 ? 0 : shown.length - 1) : Math.min(Math.max(current + step, 0), shown.length - 1);
    shown[place].focus({ preventScroll: true });
    shown[place].scrollIntoView({ block: "start" });
  }

  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  for (const button of all("[data-group]", form)) button.addEventListener("click", () => choose(button.dataset.group));
  find(".reset").addEventListener("click", showAll);
  find(".help", form).addEventListener("click", () => find("dialog.keys").showModal());
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || find("dialog[open]")) return;
    const search = form.elements.text;
    if (event.target === search && event.key === "Escape") {
      showAll();
      search.blur();
      event.preventDefault();
    }
    if (event.target.closest("input, select, textarea, audio")) return;
    const step = { j: 1, ArrowRight: 1, k: -1, ArrowLeft: -1 }[event.key];
    if (step) move(step);
    else if (event.key === "/") search.focus();
    else if (event.key === "?") find("dialog.keys").showModal();
    else return;
    event.preventDefault();
  });
  apply();
}

function pictures() {
  const dialog = find("dialog.large");
  for (const button of all("button.picture")) {
    button.addEventListener("click", () => {
      find("div", dialog).replaceChildren(find(".frame", button).cloneNode(true));
      dialog.showModal();
    });
  }
  for (const each of all("dialog")) {
    each.addEventListener("click", (event) => { if (event.target === each) each.close(); });
  }
}

function nearest(points, step) {
  return points.reduce((best, point) => (Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best));
}

function numbersUnderThePointer(area) {
  const series = JSON.parse(area.dataset.points);
  const last = Number(area.dataset.last);
  const cross = Object.assign(document.createElement("div"), { className: "cross", hidden: true });
  const tip = Object.assign(document.createElement("div"), { className: "tip", hidden: true });
  area.append(cross, tip);
  area.addEventListener("pointermove", (event) => {
    const box = area.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * last;
    const found = series.map((one) => ({ name: one.name, point: nearest(one.points, at) }));
    const step = nearest(found.map((one) => one.point), at)[0];
    const share = step / last;
    const lines = found.map(({ name, point }) => `${name} ${point[1]}${point[0] === step ? "" : ` (step ${point[0]})`}`);
    tip.textContent = [`step ${step}`, ...lines].join("\n");
    tip.hidden = cross.hidden = false;
    cross.style.left = `${100 * share}%`;
    tip.style.maxWidth = `calc(${100 * Math.max(share, 1 - share)}% - .5rem)`;
    tip.style.left = share < 0.5 ? `calc(${100 * share}% + .5rem)` : "auto";
    tip.style.right = share < 0.5 ? "auto" : `calc(${100 * (1 - share)}% + .5rem)`;
  });
  area.addEventListener("pointerleave", () => { tip.hidden = cross.hidden = true; });
}

if (find(".filters")) rowsAndFilters();
if (find("dialog.large")) pictures();
all("[data-points]").forEach(numbersUnderThePointer);
