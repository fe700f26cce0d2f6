"use strict";
// What a mark of a chart says: on hover, tap or arrow keys in a tooltip.
// Every number of it stands in a table of the page too, so that the page is whole without this.
const tip = document.getElementById("tip");
let shown = null, pointed = false;

const marksOf = chart => [...chart.querySelectorAll(".mark")];

function hide() {
  if (shown) shown.classList.remove("on");
  shown = null;
  tip.hidden = true;
}

function show(mark) {
  if (mark === shown) return;
  hide();
  shown = mark;
  mark.classList.add("on");
  tip.textContent = mark.dataset.say;
  tip.hidden = false;
  place();
}

function place() {
  if (!shown) return;
  const at = shown.getBoundingClientRect(), box = tip.getBoundingClientRect();
  const left = Math.min(at.left + at.width / 2, innerWidth - box.width - 8);
  const above = Math.max(at.top, 0) - box.height - 6;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${above > 0 ? above : Math.min(at.bottom + 6, innerHeight - box.height)}px`;
}

const KEYS = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1 };

function step(event) {
  if (!KEYS[event.key] || event.target !== event.currentTarget) return;
  event.preventDefault();
  const marks = marksOf(event.currentTarget), now = marks.indexOf(shown);
  const to = now < 0 ? 0 : now + KEYS[event.key];
  if (!marks[to]) return;
  marks[to].scrollIntoView({ block: "nearest", inline: "nearest" });
  pointed = false;
  show(marks[to]);
}

for (const title of document.querySelectorAll(".mark > title")) {
  title.parentElement.dataset.say = title.textContent;
  title.remove();  // or the browser shows a tooltip of its own
}
for (const chart of document.querySelectorAll("[data-marks]")) {
  chart.tabIndex = 0;
  chart.addEventListener("keydown", step);
  chart.addEventListener("blur", hide);
}
document.addEventListener("pointerover", event => {
  if (event.target === tip) return;
  const mark = event.target.closest(".mark");
  // A pointer at rest, under which the page scrolls, hides nothing that a key has shown.
  if (mark) show(mark); else if (pointed) hide();
  pointed = Boolean(mark);
});
document.addEventListener("keydown", event => { if (event.key === "Escape") hide(); });
document.addEventListener("scroll", place, true);
