const packed = Uint8Array.from(atob(document.getElementById("specs").textContent), letter => letter.charCodeAt(0));
const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
const specs = await new Response(unpacked).json();
const reading = document.getElementById("reading");
const root = document.documentElement;

// What a mark says when it is pointed at, in one line.
const said = mark => {
  const tip = mark.__data__?.tooltip;
  return tip ? Object.entries(tip).map(([name, value]) => `${name}: ${value}`).join(" · ") : "";
};

function readWithKeys(chart) {
  let at = -1, marked = null;
  const leave = () => { marked?.classList.remove("reading"); marked = null; reading.textContent = ""; };
  chart.addEventListener("keydown", event => {
    const step = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") leave();
    if (!step || event.target !== chart) return;
    const marks = [...chart.querySelectorAll("path, rect, text")].filter(mark => said(mark));
    if (!marks.length) return;
    event.preventDefault();
    at = (at + step + marks.length) % marks.length;
    leave();
    marked = marks[at];
    marked.classList.add("reading");
    reading.textContent = said(marked);
  });
  chart.addEventListener("blur", leave);
}

async function draw(chart) {
  const spec = specs[chart.dataset.chart];
  if (!spec || chart.dataset.drawn || !chart.clientWidth) return;
  chart.dataset.drawn = "begun";
  chart.setAttribute("aria-label", spec.description);
  const content = document.createElement("div");
  chart.append(content);
  try {
    await window.vegaEmbed(content, spec, { renderer: "svg", actions: false });
    readWithKeys(chart);
    chart.dataset.drawn = "done";
  } catch (error) {
    content.textContent = `This chart could not be drawn: ${error.message}`;
    chart.dataset.drawn = "failed";
  }
}

async function drawAll() {
  for (const chart of document.querySelectorAll(".chart")) await draw(chart);
  root.dataset.drawn = "done";
}

document.getElementById("run")?.addEventListener("change", event => {
  for (const part of document.querySelectorAll(".of-run")) part.hidden = part.dataset.run !== event.target.value;
  drawAll();
});

document.getElementById("theme").addEventListener("click", () => {
  const dark = getComputedStyle(root).getPropertyValue("--page").trim() === "#0f151c";
  root.dataset.theme = dark ? "light" : "dark";
});

drawAll();
