// Completions as text: Python in colours, control characters and bidirectional marks by their names.
const SHOWN = 6000; // characters of a completion that are shown at once
const COLOURED = 20000; // a longer completion has colours only in what is shown at first
const PIECE = 4000; // characters of a piece of a long completion
const WORDS = "and|as|assert|break|class|continue|def|elif|else|except|finally|for|from|if|import|in|is|lambda|not|" +
  "or|pass|raise|return|try|while|with|yield|None|True|False";
const ODD = new RegExp(
  "[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u00ad\\u061c\\u180e\\u200b-\\u200f\\u2028-\\u202e" +
  "\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb]|" +
  "[\\ud800-\\udbff](?![\\udc00-\\udfff])|(?<![\\ud800-\\udbff])[\\udc00-\\udfff]", "g");
const TOKEN = new RegExp(
  "(?<s>\"\"\"[^]*?(?:\"\"\"|$)|'''[^]*?(?:'''|$)|\"(?:\\\\.|[^\"\\\\\\n])*\"?|'(?:\\\\.|[^'\\\\\\n])*'?)|" +
  "(?<c>#[^\\n]*)|" +
  "(?<n>\\b\\d[\\w.]*)|\\b(?<k>" + WORDS + ")\\b", "g");

// Text nodes for `text`, with a marked name in place of each odd character.
function visible(text) {
  const nodes = [];
  let done = 0;
  for (const found of text.matchAll(ODD)) {
    if (found.index > done) nodes.push(text.slice(done, found.index));
    const code = found[0].charCodeAt(0).toString(16).toUpperCase().padStart(4, "0");
    nodes.push(make("span", "odd", "U+" + code));
    done = found.index + 1;
  }
  nodes.push(text.slice(done));
  return nodes;
}

function coloured(text) {
  const nodes = [];
  let done = 0;
  for (const found of text.matchAll(TOKEN)) {
    nodes.push(...visible(text.slice(done, found.index)));
    const kind = Object.keys(found.groups).find((name) => found.groups[name] !== undefined);
    nodes.push(make("span", kind, ...visible(found[0])));
    done = found.index + found[0].length;
  }
  nodes.push(...visible(text.slice(done)));
  return nodes;
}

// Blocks of at most PIECE characters. A browser needs long to lay out a line of a megabyte. It lays out each block
// on its own, and those out of sight not at all. A block ends after a line end if it has one.
function blocks(text) {
  const found = [];
  for (let from = 0; from < text.length;) {
    let to = Math.min(from + PIECE, text.length);
    if (to < text.length) {
      const end = text.lastIndexOf("\n", to - 1);
      if (end >= from) to = end + 1;
      else if (/[\ud800-\udbff]/.test(text[to - 1])) to -= 1; // no half of a letter
    }
    found.push(make("span", "piece", ...visible(text.slice(from, to))));
    from = to;
  }
  return found;
}

// A completion in a box; the rest of a long one comes when asked for.
function code(text) {
  const box = make("pre", "", ...coloured(text.slice(0, SHOWN)));
  box.tabIndex = 0;
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", "Completion");
  if (text.length <= SHOWN) return [box];
  const button = make("button", "all", "Show all " + text.length.toLocaleString("en") + " characters");
  button.type = "button";
  button.addEventListener("click", () => {
    box.replaceChildren(...(text.length > COLOURED ? blocks(text) : coloured(text)));
    button.remove();
    box.focus();
  });
  return [box, button];
}

function number(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  const rounded = +(+value).toPrecision(digits);
  return rounded !== 0 && Math.abs(rounded) < 1e-3 ? rounded.toExponential() : String(rounded);
}

// What is known about a completion, in one line: the verdict, then chips. rest: [[name, text]], or an element as it is.
function told(title, value, correct, rest) {
  const kind = value === null ? "none" : correct ? "right" : "wrong";
  const line = make("p", "told", title && make("strong", "", ...visible(title)));
  line.append(make("span", "chip " + kind, value === null ? "no answer" : correct ? "✓ right" : "✗ wrong"));
  if (value !== null) line.append(make("span", "", ...visible(value.slice(0, 200))));
  for (const one of rest) {
    if (one instanceof Node) line.append(one);
    else if (one[1] !== null && one[1] !== undefined) {
      line.append(make("span", "chip", one[0] + " ", ...visible(String(one[1]))));
    }
  }
  return line;
}
