// What attendants say around an answer: triage before it, allergies and missing sources after it.

import { el, icon, plain } from "./dom.js";

// How the texts begin (data/triage.py, patient.py, grounding.py); what begins otherwise is a plain note.
const KINDS = [
  ["emergency", /^EMERGENCY\b/],
  ["allergy", /^ALLERGY\b/],
  ["doctor", /^See a doctor\b/],
  ["self-care", /^Self-care\b/],
  ["unsourced", /^(Unsourced|Invented)\b/],
];
const HEADLINE = /^([A-Za-z][\w ,-]{1,60}?)(?: \(rule ([\w-]{1,60})\))?[.:]\s+(?=\S)/;
const NUMBERS = /\b(112|911|999|988|1-800-222-1222)\b/;

/** A notice as an element; live: it has just come, and a screen reader says it at once. */
export function notice(text, live) {
  const whole = plain(text);
  const kind = KINDS.find(([, begins]) => begins.test(whole))?.[0] ?? "note";
  const headline = kind === "note" ? null : whole.match(HEADLINE);
  const body = headline ? whole.slice(headline[0].length) : whole;
  return el(
    "div",
    { class: `notice ${kind}`, role: live ? "alert" : "note" },
    icon("alert"),
    el(
      "div",
      {},
      headline &&
        el(
          "strong",
          { class: "headline" },
          headline[1] === "EMERGENCY" ? "Emergency" : headline[1] === "ALLERGY" ? "Allergy" : headline[1],
        ),
      el("p", {}, kind === "emergency" ? callable(body) : body),
      headline?.[2] && el("span", { class: "rule" }, `rule ${headline[2]}`),
    ),
  );
}

/** The text with its emergency numbers to be tapped. */
function callable(text) {
  return text
    .split(NUMBERS)
    .map((part, i) => (i % 2 ? el("a", { href: `tel:${part.replaceAll("-", "")}` }, part) : part));
}

/** Texts line by line, but for rows that stand beside them as cards. */
export function linesOf(texts, rows) {
  const lines = texts.flatMap((text) => plain(text).split("\n"));
  return lines.filter((line) => line.trim() && !rows.has(line.match(/^\[DB (\d+)\]/)?.[1]));
}

/** The names that lines like "Unsourced, for no cited row holds it: ibuprofen; an X-ray." have. */
export function unsourcedNames(lines) {
  const lists = lines.map((line) => line.match(/^Unsourced\b[^:]*: *(.+?)\.?$/)?.[1] ?? "");
  return lists
    .flatMap((list) => list.split("; "))
    .filter((name) => name.length > 1 && name.length < 80)
    .slice(0, 60);
}
