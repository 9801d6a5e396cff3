// The patient card: its form, and how it reads. The rules are the server's (data/patient.py), which checks it again.

import { byId, open, plain } from "./dom.js";

const LISTS = ["allergies", "conditions", "medications"];
const MOST = 40; // entries of a list
const LONGEST = 80; // letters of an entry

/** The card in a line, "" for an empty one. */
export function cardLine(card) {
  const parts = [];
  if (card.age !== undefined)
    parts.push(card.age < 2 ? `${Math.round(card.age * 12)} months old` : `${card.age} years old`);
  if (card.sex) parts.push(card.sex);
  if (card.pregnancy === false) parts.push("not pregnant");
  else if (card.pregnancy) parts.push(card.pregnancy === true ? "pregnant" : `${card.pregnancy} weeks pregnant`);
  const lists = LISTS.filter((key) => Array.isArray(card[key]) && card[key].length).map(
    (key) => `${key}: ${card[key].join(", ")}`,
  );
  return plain([parts.join(", "), ...lists].filter(Boolean).join("; "));
}

/** Let the user change the card; the changed one, or null if it stays as it was. */
export async function editCard(card) {
  const form = byId("patient").querySelector("form");
  fill(form, card);
  let changed = null;
  const submit = (event) => {
    const { card: entered, errors } = read(form);
    showErrors(errors);
    if (Object.keys(errors).length) event.preventDefault();
    else changed = entered;
  };
  const erase = () => {
    changed = {};
    byId("patient").close("save");
  };
  form.addEventListener("submit", submit);
  form.addEventListener("change", showFields);
  byId("erase-patient").addEventListener("click", erase);
  const saved = (await open(byId("patient"))) === "save";
  form.removeEventListener("submit", submit);
  byId("erase-patient").removeEventListener("click", erase);
  form.reset();
  return saved ? changed : null;
}

function fill(form, card) {
  form.reset();
  showErrors({});
  form.age.value = card.age ?? "";
  form.sex.value = card.sex ?? "";
  form.pregnancy.value = { undefined: "", false: "no" }[card.pregnancy] ?? "yes";
  form.weeks.value = typeof card.pregnancy === "number" ? card.pregnancy : "";
  for (const key of LISTS) form[key].value = Array.isArray(card[key]) ? card[key].join("\n") : "";
  showFields();
}

function showFields() {
  const form = byId("patient").querySelector("form");
  byId("pregnancy-field").hidden = form.sex.value === "male";
  byId("weeks-field").hidden = form.sex.value === "male" || form.pregnancy.value !== "yes";
}

/** What the form says: {card, errors by field}. */
function read(form) {
  const card = {};
  const errors = {};
  const age = form.age.value.trim().replace(",", ".");
  if (age) {
    card.age = Number(age);
    if (!(card.age >= 0 && card.age <= 130)) errors.age = "A number of years, 0 to 130";
  }
  if (form.sex.value) card.sex = form.sex.value;
  if (form.sex.value !== "male" && form.pregnancy.value) {
    const weeks = form.weeks.value.trim();
    card.pregnancy = form.pregnancy.value === "yes";
    if (card.pregnancy && weeks) {
      card.pregnancy = Number(weeks);
      if (!(Number.isInteger(card.pregnancy) && card.pregnancy >= 1 && card.pregnancy <= 45))
        errors.weeks = "A whole number, 1 to 45";
    }
  }
  for (const key of LISTS) {
    const entries = form[key].value
      .split("\n")
      .map((line) => line.trim())
      .filter(Boolean);
    if (entries.length > MOST) errors[key] = `${entries.length} entries; ${MOST} are the most`;
    if (entries.some((entry) => [...entry].length > LONGEST)) errors[key] = `A line may have ${LONGEST} letters`;
    if (entries.some((entry) => plain(entry) !== entry)) errors[key] = "A line holds a control character";
    if (entries.length) card[key] = entries;
  }
  return { card, errors };
}

function showErrors(errors) {
  for (const key of ["age", "weeks", ...LISTS]) {
    byId(`${key}-error`).textContent = errors[key] ?? "";
    byId(key).setAttribute("aria-invalid", String(key in errors));
  }
  const first = Object.keys(errors)[0];
  if (first) byId(first).focus();
}
