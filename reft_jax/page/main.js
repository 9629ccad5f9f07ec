// Opens the page: theme, charts, questions, rollouts. `ready` on the body says when all is there.
function setTheme(name) {
  document.documentElement.dataset.theme = name;
  byId("theme").textContent = name === "dark" ? "Light" : "Dark";
  redraw();
}

async function opening() {
  setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  byId("theme").addEventListener("click", () => setTheme(theme() === "dark" ? "light" : "dark"));
  const data = await unpacked(+document.body.dataset.main);
  drawCharts(data.charts);
  await openQuestions(data.sets, new Set(data.sampled));
  await openRollouts(data.iterations);
  document.body.dataset.ready = "yes";
}

opening().catch((error) => {
  byId("count").textContent = "This page could not be opened (" + error + "); a current browser is needed.";
  throw error;
});
