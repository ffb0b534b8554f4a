"use strict";
// Values of a chart at the step under the pointer, or at the one chosen with the arrow keys.
const SVG = "http://www.w3.org/2000/svg";
for (const plot of document.querySelectorAll(".plot")) {
  const svg = plot.querySelector("svg");
  const told = plot.parentElement.querySelector(".values");
  const [, , top, bottom] = svg.dataset.box.split(",").map(Number);
  const curves = [...svg.querySelectorAll(".curve")].map((g) => ({
    name: g.dataset.name,
    points: JSON.parse(g.dataset.points), // [step, x, y, value as text]
  }));
  const places = new Map(curves.flatMap((c) => c.points.map(([step, x]) => [step, x])));
  const steps = [...places.keys()].sort((a, b) => a - b);
  const marks = document.createElementNS(SVG, "g");
  svg.append(marks);
  let at = -1;

  const add = (kind, attributes) => {
    const mark = document.createElementNS(SVG, kind);
    for (const [name, value] of Object.entries(attributes)) mark.setAttribute(name, value);
    marks.append(mark);
  };
  const hide = () => {
    marks.replaceChildren();
    told.textContent = "\u00a0";
  };
  const show = (index) => {
    at = Math.max(0, Math.min(steps.length - 1, index));
    const step = steps[at], x = places.get(step), words = [];
    marks.replaceChildren();
    add("path", { class: "cross", d: `M${x} ${top}V${bottom}` });
    for (const { name, points } of curves) {
      const point = points.find(([s]) => s === step);
      if (!point) continue;
      add("circle", { class: "at", cx: point[1], cy: point[2], r: 3.5 });
      words.push(`${name} ${point[3]}`);
    }
    const text = `step ${step}: ${words.join(", ")}`;
    told.textContent = text;
    plot.setAttribute("aria-valuenow", step);
    plot.setAttribute("aria-valuetext", text);
  };
  const follow = (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    let nearest = 0;
    steps.forEach((step, i) => {
      if (Math.abs(places.get(step) - x) < Math.abs(places.get(steps[nearest]) - x)) nearest = i;
    });
    show(nearest);
  };

  const about = plot.getAttribute("aria-label");
  plot.tabIndex = 0;
  plot.setAttribute("role", "slider");
  plot.setAttribute("aria-label", `${about} Arrow keys go from step to step.`);
  plot.setAttribute("aria-valuemin", steps[0]);
  plot.setAttribute("aria-valuemax", steps[steps.length - 1]);
  plot.setAttribute("aria-valuenow", steps[steps.length - 1]);
  plot.addEventListener("pointermove", follow);
  plot.addEventListener("pointerdown", follow);
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("focus", () => { if (plot.matches(":focus-visible")) show(at < 0 ? steps.length - 1 : at); });
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const to = {
      ArrowLeft: at - 1, ArrowDown: at - 1, ArrowRight: at + 1, ArrowUp: at + 1,
      PageDown: at - 10, PageUp: at + 10, Home: 0, End: steps.length - 1,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    show(to);
  });
}
