// What this browser keeps: consultations, the patient card, the consent to ratings and their receipts, the theme. In
// localStorage, under names that begin with "chatdoctor."; where the browser allows none, in memory until the page is
// left.

const PREFIX = "chatdoctor.";
const CONSULTATION = "consultation.";
const RECEIPT = "receipt.";
const memory = new Map();
let told = false;

/** Called once, with a line for the user, when something could not be kept. */
export const trouble = { tell: () => {} };

function read(name) {
  try {
    return localStorage.getItem(PREFIX + name) ?? memory.get(name) ?? null;
  } catch {
    return memory.get(name) ?? null;
  }
}

function write(name, text) {
  try {
    localStorage.setItem(PREFIX + name, text);
    memory.delete(name);
  } catch {
    memory.set(name, text);
    if (!told)
      trouble.tell(
        "This browser keeps no more: consultations last until the page is left. Erase old ones to make room.",
      );
    told = true;
  }
}

function remove(name) {
  memory.delete(name);
  try {
    localStorage.removeItem(PREFIX + name);
  } catch {
    // Nothing is there.
  }
}

function names() {
  try {
    const kept = Object.keys(localStorage).filter((name) => name.startsWith(PREFIX));
    return [...new Set([...kept.map((name) => name.slice(PREFIX.length)), ...memory.keys()])];
  } catch {
    return [...memory.keys()];
  }
}

function readJson(name) {
  try {
    return JSON.parse(read(name));
  } catch {
    return null;
  }
}

// --- consultations ---

/** A consultation without turns, which is kept from its first turn on. */
export function newConsultation() {
  return { id: `${Date.now()}-${Math.random().toString(36).slice(2, 10)}`, changed: Date.now(), turns: [] };
}

/** A question without an answer. end: null while it is written, then stop, length, stopped, cut or failed. */
export function newTurn(question) {
  return { question, before: [], rows: [], answer: "", after: [], leftOut: 0, end: null, trouble: "", rating: null };
}

/** All of them, the latest first. */
export function consultations() {
  const found = names()
    .filter((name) => name.startsWith(CONSULTATION))
    .map((name) => consultation(name.slice(CONSULTATION.length)));
  return found.filter((one) => one !== null).sort((a, b) => b.changed - a.changed);
}

/** The one of that id, null if there is none. What is no consultation is none. */
export function consultation(id) {
  const value = readJson(CONSULTATION + id);
  if (!value || !Array.isArray(value.turns) || !value.turns.every((turn) => typeof turn?.question === "string"))
    return null;
  const turns = value.turns.map((turn) => {
    const whole = { ...newTurn(turn.question), ...turn };
    for (const key of ["before", "rows", "after"]) if (!Array.isArray(whole[key])) whole[key] = [];
    whole.answer = String(whole.answer);
    return whole;
  });
  return { id, changed: Number(value.changed) || 0, turns };
}

export function keep(one) {
  write(CONSULTATION + one.id, JSON.stringify({ changed: one.changed, turns: one.turns }));
}

export function forget(id) {
  remove(CONSULTATION + id);
}

// --- the rest ---

/** The patient card as the server takes it, {} for none. */
export function patient() {
  const card = readJson("patient");
  return card && typeof card === "object" && !Array.isArray(card) ? card : {};
}

export function keepPatient(card) {
  if (Object.keys(card).length) write("patient", JSON.stringify(card));
  else remove("patient");
}

export function consent() {
  return read("consent") !== null;
}

export function keepConsent(agreed) {
  if (agreed) write("consent", new Date().toISOString());
  else remove("consent");
}

/** What takes back the ratings that were sent from this browser; one entry each, for two tabs may send at a time. */
export function receipts() {
  return names()
    .filter((name) => name.startsWith(RECEIPT))
    .map((name) => name.slice(RECEIPT.length));
}

export function keepReceipt(receipt) {
  write(RECEIPT + receipt, "");
}

export function forgetReceipt(receipt) {
  remove(RECEIPT + receipt);
}

export function keepTheme(theme) {
  write("theme", theme);
}

/** Everything but the theme, which tells nothing of anybody. */
export function forgetAll() {
  for (const name of names()) if (name !== "theme") remove(name);
}
