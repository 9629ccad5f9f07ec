"use strict";
// The page's data: chunk N is the text of the element cN. It is opened when it is first needed; a few stay open.
const OPEN_CHUNKS = 8;
const opened = new Map();

async function unpacked(number) {
  const text = atob(document.getElementById("c" + number).textContent);
  const bytes = Uint8Array.from(text, (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

function chunk(number) {
  const found = opened.get(number) || unpacked(number);
  opened.delete(number);
  opened.set(number, found);
  if (opened.size > OPEN_CHUNKS) opened.delete(opened.keys().next().value);
  return found;
}

// Value number `at` of a paged list, pages being [[chunk, number of its values]].
async function valueOf(pages, at) {
  for (const [number, size] of pages) {
    if (at < size) return (await chunk(number))[at];
    at -= size;
  }
  return undefined;
}

async function allOf(pages) {
  return (await Promise.all(pages.map(([number]) => chunk(number)))).flat();
}

// An element with a class and children. Text always becomes a text node, so that nothing in it is read as HTML.
function make(tag, kind, ...children) {
  const element = document.createElement(tag);
  if (kind) element.className = kind;
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const byId = (id) => document.getElementById(id);

function fill(select, pairs) {
  select.replaceChildren(...pairs.map(([value, text]) => {
    const option = make("option", "", text);
    option.value = value;
    return option;
  }));
}
