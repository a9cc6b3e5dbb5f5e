(() => {
  "use strict";
  const specs = JSON.parse(document.getElementById("specs").textContent);
  const chosen = new Map(specs.map((spec) => [spec.id, 0]));
  const root = document.documentElement;
  const colour = (name) => getComputedStyle(root).getPropertyValue("--" + name).trim();

  function scale(name) {
    const ends = ["low", "low-half", "mid", "high-half", "high"].map(colour);
    if (name === "amount") return [[0, colour("little")], [1, colour("much")]];
    if (name === "helps") ends.reverse();
    return ends.map((value, index) => [index / 4, value]);
  }

  function trace(spec, given, index) {
    const made = structuredClone(given);
    if (spec.views.length) made.visible = spec.views[chosen.get(spec.id)].traces.includes(index);
    const name = given.meta && given.meta.scale;
    if (name && made.type === "heatmap") made.colorscale = scale(name);
    else if (name) made.marker.colorscale = scale(name);
    const bar = made.colorbar || (made.marker && made.marker.colorbar);
    if (bar) bar.tickfont = { size: 11 };
    return made;
  }

  function layout(spec, width) {
    const made = structuredClone(spec.layout);
    for (const name of ["xaxis", "yaxis"]) {
      made[name] = Object.assign(
        { automargin: true, fixedrange: true, gridcolor: colour("grid"), linecolor: colour("line"),
          zerolinecolor: colour("soft") },
        made[name]);
      made[name].tickfont = { size: 12 };
    }
    return Object.assign(made, {
      autosize: !width, width: width || undefined, height: spec.height,
      margin: { l: 8, r: 8, t: made.showlegend ? 34 : 10, b: 40 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("ink"), size: 12, family: getComputedStyle(document.body).fontFamily },
      legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom" },
      hoverlabel: { bgcolor: colour("panel"), bordercolor: colour("line"), font: { color: colour("ink") } },
      dragmode: false, showlegend: Boolean(made.showlegend),
    });
  }

  function draw(spec, width) {
    const data = spec.data.map((given, index) => trace(spec, given, index));
    return Plotly.react(spec.id, data, layout(spec, width), { displayModeBar: false, responsive: !width });
  }

  const drawAll = (width) => Promise.all(specs.map((spec) => draw(spec, width)));

  function show(id, view) {
    chosen.set(id, view);
    for (const button of document.querySelectorAll(`[data-for="${id}"] button`)) {
      button.setAttribute("aria-pressed", String(Number(button.dataset.view) === view));
    }
    draw(specs.find((spec) => spec.id === id));
  }

  for (const control of document.querySelectorAll("div[data-for]")) {
    control.addEventListener("click", (event) => {
      if (event.target.dataset.view) show(control.dataset.for, Number(event.target.dataset.view));
    });
  }
  for (const control of document.querySelectorAll("select[data-for]")) {
    control.addEventListener("change", () => show(control.dataset.for, Number(control.value)));
  }

  // Paper is light and of one width, whatever the screen is.
  function print(on) {
    if (on === ("print" in root.dataset)) return;
    if (on) root.dataset.print = "";
    else delete root.dataset.print;
    drawAll(on ? 660 : undefined);
  }
  matchMedia("print").addEventListener("change", (event) => print(event.matches));
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawAll());

  drawAll().then(() => { root.dataset.drawn = String(specs.length); });
})();
