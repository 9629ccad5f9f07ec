// The rollouts of one iteration, or of all: what was sampled, what it was paid, and how it was reinforced.
const AT_ONCE = 20;

const KEYS = {
  row: (line, at) => at, high: (line) => -(line.advantage ?? -Infinity), low: (line) => line.advantage ?? Infinity,
  gap: (line) => -(line.sampler_gap ?? -Infinity), long: (line) => -line.completion.length,
};

function rolloutCard(line) {
  const sign = line.advantage > 0 ? "reinforced" : line.advantage < 0 ? "weakened" : null;
  const kind = sign === "reinforced" ? "right" : sign === "weakened" ? "wrong" : "";
  const advantage = make("span", "chip " + kind, "advantage " + number(line.advantage, 3) + (sign ? ", " + sign : ""));
  const rest = [["from", line.of], ["wanted", line.answer_value], ["reward", line.reward],
    ...Object.entries(line.parts || {}), advantage, ["gap", number(line.sampler_gap, 2)],
    ["outcome", line.outcome], make("span", "chip", number(line.ms, 3) + " ms")];
  return make("div", "card", told(line.item_id, line.value, line.correct, rest), ...code(line.completion));
}

async function openRollouts(iterations) {
  if (!iterations.length) {
    byId("told").textContent = "There are no rollouts: no iteration is done, or an older version did not keep them.";
    for (const controls of document.querySelectorAll("#rollouts .controls")) controls.hidden = true;
    return;
  }
  let loaded = [], lines = [], asked = 0;
  const more = () => {
    const from = byId("sampled").childElementCount;
    byId("sampled").append(...lines.slice(from, from + AT_ONCE).map(rolloutCard));
    byId("more").disabled = byId("sampled").childElementCount >= lines.length;
  };
  const show = () => {
    const key = KEYS[byId("by").value], word = byId("item").value.trim().toLowerCase();
    const exact = loaded.some((line) => line.item_id.toLowerCase() === word); // gsm8k_1 is not gsm8k_12
    const wanted = (item) => (exact ? item === word : item.includes(word));
    lines = loaded.filter((line) => wanted(line.item_id.toLowerCase())).map((line, at) => [key(line, at), line])
      .sort((a, b) => a[0] - b[0] || 0).map(([, line]) => line);
    const reward = lines.reduce((sum, line) => sum + line.reward, 0) / lines.length;
    const positive = lines.filter((line) => line.advantage > 0).length;
    byId("told").textContent = !lines.length ? "No rollout here is of such a question." : lines.length +
      " rollouts, mean reward " + number(reward, 3) + ", " + positive + " with a positive advantage";
    byId("sampled").replaceChildren();
    more();
  };
  const name = (one) => one.purpose + " " + one.iteration;
  const load = async () => {
    const turn = ++asked, chosen = byId("iteration").value, found = [];
    for (const one of chosen === "all" ? iterations : [iterations[+chosen]]) {
      const own = await allOf(one.pages);
      if (turn !== asked) return;
      for (const line of own) found.push(chosen === "all" ? { ...line, of: name(one) } : line);
    }
    loaded = found;
    show();
  };
  fill(byId("iteration"), [["all", "all of this page"], ...iterations.map((one, i) => [String(i), name(one)])]);
  byId("iteration").value = String(iterations.length - 1);
  byId("iteration").addEventListener("change", load);
  byId("by").addEventListener("change", show);
  byId("item").addEventListener("input", show);
  byId("more").addEventListener("click", more);
  await load();
}

// A button that shows what all iterations of the page sampled for a question.
function rolloutsButton(item) {
  const button = make("button", "sampled", "Rollouts of this question");
  button.type = "button";
  button.addEventListener("click", () => {
    byId("item").value = item;
    byId("iteration").value = "all";
    byId("iteration").dispatchEvent(new Event("change"));
    byId("rollouts").scrollIntoView();
    byId("item").focus({ preventScroll: true });
  });
  return button;
}
