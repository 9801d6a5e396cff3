// The page: which consultation is shown, what is asked, and what the buttons outside a turn do.

import { setKey, takeBack } from "./api.js";
import { abandon, ask, connect, keep, messagesOf, server, stop, withKey, writing } from "./asking.js";
import { byId, el, furnish, icon, open, plain, say, sure } from "./dom.js";
import { cardLine, editCard } from "./patient.js";
import { rated } from "./rating.js";
import * as store from "./store.js";
import { TurnView } from "./turn.js";

let shown = store.newConsultation();
let views = []; // of the turns of the consultation that is shown
let pinned = true; // whether the end of the consultation is kept in view

const tell = {
  began() {
    pinned = true;
    showConsultation();
    showBusy();
  },
  changed: refresh,
  kept: showList,
  connected: showServer,
  ended: showBusy,
};

// --- what a turn's buttons do ---

const actions = {
  async copy(view) {
    say((await copied(view.turn.answer)) ? "Copied" : "This browser does not let the page copy");
    view.buttons.querySelector('[aria-label="Copy answer"]')?.classList.add("done");
  },
  edit(view) {
    if (writing()) return;
    const at = shown.turns.indexOf(view.turn);
    view.editQuestion(shown.turns.length - at - 1, (text) => askAgain(at, text));
  },
  retry(view) {
    askAgain(shown.turns.indexOf(view.turn), view.turn.question);
  },
  async rate(view, rating) {
    const at = shown.turns.indexOf(view.turn);
    const consultation = shown;
    const messages = [...messagesOf(shown.turns.slice(0, at)), { role: "user", content: view.turn.question }];
    try {
      const result = await rated(messages, view.turn.answer, rating, withKey);
      if (!result) return;
      view.turn.rating = result;
      keep(consultation, tell);
      view.update({ last: at === shown.turns.length - 1 });
      say(`Kept as rating ${result.id}`);
    } catch (error) {
      showError(`The rating was not kept: ${error.message}`);
    }
  },
};

/** Ask anew from a turn on; it and what follows it go. */
function askAgain(at, question) {
  if (writing() || at < 0) return;
  shown.turns.length = at;
  byId("question").focus();
  ask(shown, question, tell);
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Not over plain http from another machine; a selection can be copied there.
    const box = el("textarea", { class: "visually-hidden", "aria-hidden": "true" });
    const focused = document.activeElement;
    box.value = text;
    document.body.append(box);
    box.select();
    const done = document.execCommand("copy");
    box.remove();
    focused?.focus();
    return done;
  }
}

// --- what is shown ---

function showConsultation() {
  byId("empty").hidden = shown.turns.length > 0;
  const known = new Map(views.map((view) => [view.turn, view]));
  views = shown.turns.map((turn) => known.get(turn) ?? new TurnView(turn, actions, () => Boolean(server()?.feedback)));
  byId("consultation").replaceChildren(...views.map((view) => view.element));
  views.forEach((view, i) => view.update({ last: i === views.length - 1 }));
  document.title = shown.turns.length ? `${title(shown)} · ChatDoctor` : "ChatDoctor";
  follow();
}

/** Bring a turn up to date, if it is in view. */
function refresh(turn, live) {
  views.find((view) => view.turn === turn)?.update({ live, last: turn === shown.turns.at(-1) });
  follow();
}

/** Keep the end in view, but never at the cost of an emergency's notice. */
function follow() {
  const box = byId("scroll");
  const alarm = views.at(-1)?.element.querySelector(".emergency");
  const most = alarm
    ? box.scrollTop + alarm.getBoundingClientRect().top - box.getBoundingClientRect().top - 8
    : Infinity;
  if (pinned) box.scrollTop = Math.min(box.scrollHeight, most);
  byId("latest").hidden = pinned || !shown.turns.length;
}

function showBusy() {
  const focused = document.activeElement;
  byId("send").hidden = Boolean(writing());
  byId("stop").hidden = !writing();
  if (focused === byId("stop") || focused === byId("send")) byId("question").focus();
}

function showList() {
  const all = store.consultations();
  byId("nothing-kept").hidden = all.length > 0;
  byId("consultations").replaceChildren(
    ...all.map((one) =>
      el(
        "li",
        {},
        el(
          "button",
          {
            type: "button",
            class: "consultation",
            "aria-current": one.id === shown.id ? "true" : null,
            onclick: () => go(one.id),
          },
          title(one),
        ),
        el(
          "button",
          { type: "button", class: "icon", "aria-label": `Erase “${title(one)}”`, onclick: () => erase(one) },
          icon("trash"),
        ),
      ),
    ),
  );
}

function title(consultation) {
  const first = plain(consultation.turns[0]?.question ?? "New consultation").replace(/\s+/g, " ");
  return first.length > 60 ? `${first.slice(0, 57)}…` : first;
}

function showServer() {
  const { model, description, disclaimer, feedback } = server();
  byId("model").textContent = plain([model, description].filter(Boolean).join(" · "));
  if (disclaimer) byId("disclaimer").textContent = plain(disclaimer).replace(/\s+/g, " ");
  byId("erase-ratings").hidden = !feedback;
}

function showPatient() {
  const line = cardLine(store.patient());
  byId("patient-line").hidden = !line;
  byId("patient-line").replaceChildren(icon("person"), el("span", {}, `Sent along: ${line}`));
}

function showError(text) {
  byId("page-error").hidden = !text;
  const close = el(
    "button",
    { type: "button", class: "icon", "aria-label": "Close this message", onclick: () => showError("") },
    icon("close"),
  );
  byId("page-error").replaceChildren(...(text ? [icon("alert"), el("span", {}, text), close] : []));
}

// --- consultations ---

function go(id) {
  const found = writing()?.consultation.id === id ? writing().consultation : store.consultation(id);
  if (!found) return;
  shown = found;
  brokenOff(shown);
  start();
}

/** Show the consultation from its end, ready for a question. */
function start() {
  pinned = true;
  views = [];
  showConsultation();
  showList();
  showSidebar(false);
  if (!touched()) byId("question").focus();
}

/** Answers that were being written when the page was left. */
function brokenOff(consultation) {
  for (const turn of consultation.turns) {
    if (turn.end === null && turn !== writing()?.turn) {
      turn.end = turn.answer ? "cut" : "failed";
      turn.trouble = "The page was left before the answer was complete. What had arrived is kept.";
    }
  }
}

async function erase(one) {
  if (!(await sure("Erase this consultation?", `“${title(one)}” will be erased from this browser.`))) return;
  if (writing()?.consultation.id === one.id) abandon();
  store.forget(one.id);
  if (shown.id === one.id) shown = store.newConsultation();
  start();
  say("Erased");
}

async function eraseAll() {
  if (
    !(await sure(
      "Erase everything?",
      "All consultations, the patient card, the key and your consent will be erased from this browser." +
        (store.receipts().length
          ? " Ratings that you sent stay on the server, and you cannot erase them afterwards: do that first."
          : ""),
    ))
  )
    return;
  abandon();
  store.forgetAll();
  setKey(null);
  shown = store.newConsultation();
  views = [];
  showConsultation();
  showList();
  showPatient();
  byId("privacy-said").textContent = "Everything in this browser is erased.";
}

async function eraseKept() {
  if (
    !(await sure(
      "Erase the ratings?",
      "The ratings that were sent from this browser will be erased on the server, and your consent is taken back.",
    ))
  )
    return;
  let erased = 0;
  let trouble = "";
  try {
    for (const receipt of store.receipts()) {
      erased += await withKey(() => takeBack(receipt));
      store.forgetReceipt(receipt);
    }
    store.keepConsent(false);
    forgetMarks();
  } catch (error) {
    trouble = ` ${error.message}`;
  }
  byId("privacy-said").textContent = `${erased} ${erased === 1 ? "rating is" : "ratings are"} erased.${trouble}`;
}

/** No answer is shown as rated any more. */
function forgetMarks() {
  const inMemory = [shown, writing()?.consultation].filter(Boolean); // later than what is stored
  for (const stored of store.consultations()) {
    const one = inMemory.find((other) => other.id === stored.id) ?? stored;
    if (!one.turns.some((turn) => turn.rating)) continue;
    for (const turn of one.turns) turn.rating = null;
    store.keep(one);
  }
  showConsultation();
}

// --- the rest of the page ---

function showSidebar(wanted) {
  const was = document.body.classList.contains("sidebar");
  document.body.classList.toggle("sidebar", wanted);
  byId("open-sidebar").setAttribute("aria-expanded", String(wanted));
  byId("page").inert = wanted;
  if (wanted) byId("new").focus();
  else if (was) byId("open-sidebar").focus();
}

function showTheme() {
  const dark =
    document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  byId("theme").setAttribute("aria-pressed", String(dark === "dark"));
  return dark;
}

function send() {
  const box = byId("question");
  const text = box.value.trim();
  if (!text || writing()) return;
  box.value = "";
  fit(box);
  if (touched()) box.blur();
  ask(shown, text, tell);
}

/** Whether the keyboard is on the screen: it would cover the answer, and its Enter begins a line. */
function touched() {
  return matchMedia("(pointer: coarse)").matches;
}

function fit(box) {
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
}

function listen() {
  const on = (id, type, act) => byId(id).addEventListener(type, act);
  on("composer", "submit", (event) => {
    event.preventDefault();
    send();
  });
  on("question", "input", () => fit(byId("question")));
  on("question", "keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || touched()) return;
    event.preventDefault();
    send();
  });
  on("stop", "click", stop);
  on("latest", "click", () => {
    pinned = true;
    follow();
  });
  on("scroll", "scroll", () => {
    const box = byId("scroll");
    pinned = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
    byId("latest").hidden = pinned || !shown.turns.length;
  });
  on("new", "click", () => {
    shown = store.newConsultation();
    start();
  });
  on("open-sidebar", "click", () => showSidebar(true));
  on("close-sidebar", "click", () => showSidebar(false));
  for (const id of ["open-patient", "patient-line"]) {
    on(id, "click", async () => {
      const card = await editCard(store.patient());
      if (card) store.keepPatient(card);
      showPatient();
    });
  }
  on("open-privacy", "click", () => {
    byId("privacy-said").textContent = "";
    open(byId("privacy"));
  });
  on("erase-all", "click", eraseAll);
  on("erase-ratings", "click", eraseKept);
  on("theme", "click", () => {
    const theme = showTheme() === "dark" ? "light" : "dark";
    document.documentElement.dataset.theme = theme;
    store.keepTheme(theme);
    showTheme();
  });
  for (const example of document.querySelectorAll(".example"))
    example.addEventListener("click", () => ask(shown, example.textContent, tell));
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
    if (document.body.classList.contains("sidebar")) showSidebar(false);
    else stop();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
  matchMedia("(max-width: 56rem)").addEventListener("change", () => showSidebar(false));
  // Another tab has changed what this browser keeps.
  addEventListener("storage", () => {
    showList();
    showPatient();
  });
  addEventListener("pagehide", () => writing() && keep(writing().consultation, tell));
}

async function begin() {
  furnish();
  store.trouble.tell = showError;
  listen();
  showTheme();
  showPatient();
  const latest = store.consultations()[0];
  if (latest) {
    shown = latest;
    brokenOff(shown);
  }
  start();
  try {
    await withKey(() => connect(tell));
    showConsultation();
  } catch (error) {
    showError(error.message);
  }
}

begin();
