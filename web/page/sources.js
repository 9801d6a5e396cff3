// The rows of the disease database behind an answer, as cards that open.

import { el, plain } from "./dom.js";

const FIELDS = [
  ["symptoms", "Symptoms"],
  ["tests", "Tests"],
  ["medications", "Medications"],
  ["text", "Text"],
  ["source", "Source"],
];

/** "[DB 712]", "[DB 712, 88]" and "[DB 712, DB 88]" (data/grounding.py): how an answer cites. */
export const CITATION = /\[DB ?(?<cited>\d{1,9}(?:, ?(?:DB ?)?\d{1,9}){0,20})\]/;

/** The ids that a text cites. */
export function citedIn(text) {
  return new Set([...text.matchAll(new RegExp(CITATION, "g"))].flatMap((match) => idsOf(match.groups.cited)));
}

/** The ids inside the brackets of a citation. */
export function idsOf(cited) {
  return cited.match(/\d+/g);
}

/** Rows as they may be shown, each with an id of its own. */
export function usable(rows) {
  const known = new Map();
  for (const row of rows)
    if (row && /^\d{1,9}$/.test(String(row.id)) && !known.has(String(row.id))) known.set(String(row.id), row);
  return known;
}

/** A section of cards, by id, and that section: {section, cards}. */
export function sources(rows, cited) {
  const cards = new Map([...usable(rows)].map(([id, row]) => [id, card(id, row)]));
  const of = (wanted) => [...cards].filter(([id]) => cited.has(id) === wanted).map(([, one]) => one);
  const others = of(false);
  const section = el(
    "div",
    { class: "sources" },
    el("h3", {}, cited.size ? "Cited from the disease database" : "Looked up in the disease database"),
    of(true),
    cited.size && others.length
      ? el("details", { class: "others" }, el("summary", {}, `Looked up, not cited: ${others.length}`), others)
      : others,
  );
  return { section, cards };
}

function card(id, row) {
  const list = el("dl");
  for (const [key, title] of FIELDS) {
    const values = Array.isArray(row[key]) ? row[key].join(", ") : (row[key] ?? "");
    if (values) list.append(el("dt", {}, title), el("dd", {}, values));
  }
  if (row.url) list.append(el("dt", {}, "Address"), el("dd", {}, address(row.url)));
  return el(
    "details",
    { class: "card" },
    el("summary", {}, el("span", { class: "id" }, `DB ${id}`), " ", row.name ?? ""),
    list,
  );
}

/** A source's address, to be followed knowingly: it is shown whole. What is not of the web is text. */
function address(text) {
  const shown = plain(text);
  let url = null;
  try {
    url = new URL(shown);
  } catch {
    // Not an address.
  }
  if (!url || !["https:", "http:"].includes(url.protocol)) return shown;
  return el("a", { href: url.href, rel: "noopener noreferrer nofollow", target: "_blank" }, url.href);
}
