// The rollouts of one iteration: what was sampled, what it was paid, and how it was reinforced.
const AT_ONCE = 20;

const KEYS = {
  row: (line) => line.row, high: (line) => -(line.advantage ?? -Infinity), low: (line) => line.advantage ?? Infinity,
  gap: (line) => -(line.sampler_gap ?? -Infinity), long: (line) => -line.completion.length,
};

function rolloutCard(line) {
  const sign = line.advantage > 0 ? "reinforced" : line.advantage < 0 ? "weakened" : null;
  const kind = sign === "reinforced" ? "right" : sign === "weakened" ? "wrong" : "";
  const advantage = make("span", "chip " + kind, "advantage " + number(line.advantage, 3) + (sign ? ", " + sign : ""));
  const rest = [["wanted", line.answer_value], ["reward", line.reward], ...Object.entries(line.parts || {}), advantage,
    ["gap", number(line.sampler_gap, 2)], ["outcome", line.outcome], make("span", "chip", number(line.ms, 3) + " ms")];
  return make("div", "card", told(line.item_id, line.value, line.correct, rest), ...code(line.completion));
}

async function openRollouts(iterations) {
  if (!iterations.length) {
    byId("told").textContent = "There are no rollouts: no iteration is done, or an older version did not keep them.";
    for (const id of ["iteration", "by", "more"]) byId(id).disabled = true;
    return;
  }
  let lines = [], asked = 0;
  const more = () => {
    const from = byId("sampled").childElementCount;
    byId("sampled").append(...lines.slice(from, from + AT_ONCE).map(rolloutCard));
    byId("more").disabled = byId("sampled").childElementCount >= lines.length;
  };
  const show = async () => {
    const turn = ++asked, one = iterations[+byId("iteration").value], found = await allOf(one.pages);
    if (turn !== asked) return;
    const key = KEYS[byId("by").value];
    lines = found.map((line) => [key(line), line]).sort((a, b) => a[0] - b[0] || 0).map(([, line]) => line);
    byId("told").textContent = one.rollouts + " rollouts, mean reward " + number(one.reward, 3) + ", " + one.positive +
      " with a positive advantage";
    byId("sampled").replaceChildren();
    more();
  };
  fill(byId("iteration"), iterations.map((one, i) => [String(i), one.purpose + " " + one.iteration]));
  byId("iteration").value = String(iterations.length - 1);
  byId("iteration").addEventListener("change", show);
  byId("by").addEventListener("change", show);
  byId("more").addEventListener("click", more);
  await show();
}
