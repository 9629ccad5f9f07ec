// The list of questions with its filters, and the chosen one. The address names the chosen question: #q=SET/ITEM.
const PER_PAGE = 25;
const FEW = 10; // distinct samples that are shown at once
const state = { set: null, index: [], found: [], page: 0, chosen: "", turn: 0, sampled: new Set() };

const GREEDY = 0, RIGHT = 1, NONE = 2, SAMPLES = 3, TIMEOUTS = 4, LENGTH = 5;

// 1 right, 0 wrong, -1 no answer: the greedy answer, or without one whether any sample is right.
function verdict(counts) {
  if (!counts) return null;
  if (counts[GREEDY] !== null) return counts[GREEDY];
  return counts[RIGHT] ? 1 : counts[NONE] === counts[SAMPLES] ? -1 : 0;
}

function matches(one, filter, model, other, words) {
  const counts = one[2][model], now = verdict(counts);
  const text = (one[0] + " " + one[1]).toLowerCase();
  if (!words.every((word) => text.includes(word))) return false;
  if (filter === "all") return true;
  if (!counts) return false;
  if (filter === "changed") return one[2][other] && (now === 1) !== (verdict(one[2][other]) === 1);
  if (filter === "timeouts") return counts[TIMEOUTS] > 0;
  return now === { right: 1, wrong: 0, none: -1 }[filter];
}

function search() {
  const filter = byId("filter").value, model = +byId("model").value, other = +byId("other").value;
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean), order = byId("order").value;
  byId("other-label").hidden = filter !== "changed";
  state.found = state.index.map((one, i) => i).filter((i) => matches(state.index[i], filter, model, other, words));
  const key = (i) => {
    const counts = state.index[i][2][model];
    return counts ? counts[order === "longest" ? LENGTH : RIGHT] : 0;
  };
  if (order === "longest") state.found.sort((a, b) => key(b) - key(a));
  if (order === "hardest") state.found.sort((a, b) => key(a) - key(b));
  state.page = 0;
  list();
}

function sign(counts) {
  const now = verdict(counts), none = ["none", now === null ? "·" : "∅"];
  const [kind, text] = now === 1 ? ["right", "✓"] : now === 0 ? ["wrong", "✗"] : none;
  const samples = counts && counts[SAMPLES] ? " " + counts[RIGHT] + "/" + counts[SAMPLES] : "";
  return make("span", kind, text + samples);
}

function list() {
  const pages = Math.max(1, Math.ceil(state.found.length / PER_PAGE)), from = state.page * PER_PAGE;
  byId("count").textContent = state.found.length + " of " + state.index.length + " questions";
  byId("pages").textContent = "Page " + (state.page + 1) + " of " + pages;
  byId("back").disabled = state.page === 0;
  byId("next").disabled = state.page >= pages - 1;
  byId("list").replaceChildren(...state.found.slice(from, from + PER_PAGE).map((i) => {
    const [item, question, models] = state.index[i], head = make("span", "head", make("strong", "", ...visible(item)));
    models.forEach((counts, i) => head.append(" ", sign(counts)));
    const link = make("a", "", head);
    link.append(make("span", "text", ...visible(question.slice(0, 200))));
    link.href = "#" + address(item);
    link.setAttribute("aria-current", String(item === state.chosen));
    return make("li", "", link);
  }));
}

const encoded = (text) => encodeURIComponent(text.toWellFormed ? text.toWellFormed() : text);
const address = (item) => "q=" + encoded(state.set.name) + "/" + encoded(item);

function answerCard(answers, place, rows) {
  const [, value, correct, outcome, reward, parts, ms, probability] = rows[0];
  const rest = [["outcome", outcome], ["reward", reward], ["reranker", probability]];
  for (const [name, part] of Object.entries(parts || {})) rest.push([name, part]);
  if (ms !== null && ms !== undefined) rest.push(make("span", "chip", number(ms, 3) + " ms"));
  const share = answers.rows.length > 1 ? rows.length + " of " + answers.rows.length : "";
  return make("div", "card", told(share, value, correct, rest), ...code(answers.prefix + answers.texts[place]));
}

function answersOf(title, answers) {
  const groups = new Map();
  for (const row of answers.rows) groups.set(row[0], [...(groups.get(row[0]) || []), row]);
  const sorted = [...groups].sort((a, b) => b[1].length - a[1].length);
  const right = answers.rows.filter((row) => row[2]).length;
  const part = make("div", "", make("h4", "", ...visible(title), answers.rows.length > 1 ?
    make("span", "", right + " of " + answers.rows.length + " right, " + groups.size + " distinct") : null));
  const card = ([place, rows]) => answerCard(answers, place, rows);
  const show = (from, to) => part.append(...sorted.slice(from, to).map(card));
  show(0, FEW);
  if (sorted.length > FEW) {
    const button = make("button", "rest", "Show " + (sorted.length - FEW) + " more");
    button.type = "button";
    button.addEventListener("click", () => { button.remove(); show(FEW); });
    part.append(button);
  }
  return part;
}

async function choose(item, focus) {
  const at = state.index.findIndex((one) => one[0] === item);
  if (at < 0) return;
  state.chosen = item;
  const set = state.set, one = await valueOf(set.pages, at);
  if (state.chosen !== item || state.set !== set) return; // another one was chosen meanwhile
  const parts = [make("h3", "", ...visible(one.item)), make("p", "asked", ...visible(one.question)),
    make("p", "", "Answer: ", make("strong", "", ...visible(one.answer)))];
  one.models.forEach((model, i) => {
    if (model && model.greedy) parts.push(answersOf(state.set.models[i] + ", greedy", model.greedy));
    if (model && model.samples) parts.push(answersOf(state.set.models[i] + ", samples", model.samples));
  });
  if (state.sampled.has(item)) parts.push(rolloutsButton(item));
  byId("one").replaceChildren(...parts);
  list();
  if (focus) { byId("one").focus({ preventScroll: true }); byId("one").scrollIntoView({ block: "nearest" }); }
}

// Opens a set; false if another one was asked for meanwhile.
async function openSet(set) {
  const turn = ++state.turn, index = set === state.set ? state.index : await chunk(set.index);
  if (turn !== state.turn) return false;
  if (set === state.set) return true;
  Object.assign(state, { set, index, chosen: "" });
  byId("set").value = set.name;
  const models = set.models.map((name, i) => [String(i), name]);
  fill(byId("model"), models);
  fill(byId("other"), models);
  byId("model").value = String(models.length - 1);
  byId("marks").textContent = "· marks: " + set.models.join(", ") + "; the greedy answer, then right samples";
  search();
  byId("one").replaceChildren();
  return true;
}

// Chooses the first question of the open set, if it has one.
async function chooseFirst() {
  if (state.index.length) await choose(state.index[0][0], false);
}

// Opens what the address names; if it is empty, the first question of the first set.
async function follow(sets, focus) {
  const named = /^#q=([^/]*)\/(.*)$/.exec(location.hash);
  let set, item;
  try {
    if (named) [set, item] = named.slice(1).map(decodeURIComponent);
  } catch {
    set = undefined;
  }
  const wanted = sets.find((one) => one.name === set) || (location.hash && state.set) || sets[0];
  if (!(await openSet(wanted))) return;
  if (item !== undefined) await choose(item, focus);
  else if (!location.hash || !state.chosen) await chooseFirst();
}

async function openQuestions(sets, sampled) {
  state.sampled = sampled;
  if (!sets.length) {
    byId("count").textContent = "No model has answered a question yet.";
    return;
  }
  fill(byId("set"), sets.map((set) => [set.name, set.name + " (" + set.models.join(", ") + ")"]));
  byId("set").addEventListener("change", async () => {
    if (!(await openSet(sets.find((set) => set.name === byId("set").value)))) return;
    const first = state.index.length ? state.index[0][0] : "";
    history.pushState(null, "", "#" + address(first)); // fires no hashchange, which would move the focus
    await chooseFirst();
  });
  for (const id of ["filter", "model", "other", "order"]) byId(id).addEventListener("change", search);
  byId("search").addEventListener("input", search);
  byId("back").addEventListener("click", () => { state.page -= 1; list(); });
  byId("next").addEventListener("click", () => { state.page += 1; list(); });
  addEventListener("hashchange", () => follow(sets, true));
  byId("list").addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    const links = [...byId("list").querySelectorAll("a")], to = links[links.indexOf(document.activeElement) + step];
    if (to) { event.preventDefault(); to.focus(); }
  });
  await follow(sets, false);
}
