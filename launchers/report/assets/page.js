// Draws the curves of the report by uPlot, when they come into view. It writes no markup: names go through text nodes.
"use strict";
(() => {
  const told = JSON.parse(document.getElementById("charts").textContent);
  const drawn = new Map(); // element -> uPlot
  const HEIGHT = 170; // pixels
  const STEPS = [...Array(12).keys()].flatMap((power) => [1, 2, 5].map((digit) => digit * 10 ** power)); // whole ones

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function short(value) {
    if (value == null) return "";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
    return String(Number(value.toPrecision(4)));
  }

  function draw(place) {
    const chart = told[place.id];
    if (!chart || place.clientWidth === 0) return;
    drawn.get(place)?.destroy();
    place.replaceChildren();
    const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false } };
    const data = uPlot.join(chart.series.map((each) => [each.x, each.y]));
    const options = {
      width: place.clientWidth,
      height: HEIGHT,
      scales: { x: { time: false } },
      cursor: { sync: { key: chart.group }, points: { size: 6 } },
      axes: [{ ...axis, size: 34, incrs: STEPS }, { ...axis, size: 62, space: 26, values: (_, splits) => splits.map(short) }],
      series: [
        { label: "step", value: (_, value) => (value == null ? "" : String(value)) },
        ...chart.series.map((each, number) => ({
          label: each.label,
          stroke: colour(`--c${number % 7}`),
          width: 1.4,
          spanGaps: true,
          points: { show: each.x.length < 3 },
          value: (_, value) => short(value),
        })),
      ],
    };
    drawn.set(place, new uPlot(options, data, place));
  }

  const places = [...document.querySelectorAll(".chart")];
  const drawAll = () => drawn.forEach((_, place) => draw(place));
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting && !drawn.has(entry.target)) draw(entry.target);
  }, { rootMargin: "300px" });
  places.forEach((place) => seen.observe(place));

  let waiting = 0;
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return; // a phone's bars come and go
    width = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(drawAll, 150);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  matchMedia("print").addEventListener("change", () => places.forEach(draw));

  // Which parts are open outlives that the page is loaded again.
  const key = "afterok " + location.pathname;
  try {
    for (const id of JSON.parse(sessionStorage.getItem(key) || "[]")) {
      const part = document.getElementById(id);
      if (part) part.open = true;
    }
    document.addEventListener("toggle", () => {
      const open = [...document.querySelectorAll("details[open][id]")].map((part) => part.id);
      sessionStorage.setItem(key, JSON.stringify(open));
    }, true);
  } catch { /* a viewer without storage */ }
})();
