// One question and its answer on the page. Knows the turn as store.js keeps it; what its buttons do, app.js says.

import { el, icon, plain, say } from "./dom.js";
import { show } from "./markdown.js";
import { linesOf, notice, unsourcedNames } from "./notices.js";
import { citedIn, sources, usable } from "./sources.js";

const ENDINGS = {
  length: "The answer was cut off at its greatest length.",
  stopped: "Stopped by you.",
};

export class TurnView {
  /** actions: {copy, edit, retry, rate}, each called with this view; feedback(): whether ratings are kept here. */
  constructor(turn, actions, feedback) {
    this.turn = turn;
    this.actions = actions;
    this.feedback = feedback;
    this.cards = new Map();
    this.spoken = 0; // letters of the answer that a screen reader has been given
    this.timer = null;
    this.sourcesShown = this.buttonsShown = ""; // what they were drawn from
    this.question = el("div", { class: "question" });
    this.before = el("div", { class: "notices" });
    this.text = el("div", { class: "text", dir: "auto" });
    this.after = el("div", { class: "notices" });
    this.status = el("p", { class: "status" });
    this.error = el("div", { class: "error", hidden: true });
    this.sources = el("div");
    this.buttons = el("div", { class: "actions" });
    this.element = el(
      "article",
      { class: "turn" },
      this.question,
      this.before,
      el(
        "div",
        { class: "answer" },
        el("h2", { class: "visually-hidden" }, "Answer"),
        this.text,
        this.status,
        this.after,
        this.sources,
        this.error,
        this.buttons,
      ),
    );
    this.showQuestion();
  }

  showQuestion() {
    this.question.replaceChildren(
      el("h2", { class: "visually-hidden" }, "Your question"),
      el("p", { class: "text", dir: "auto" }, this.turn.question),
      this.button("edit", "Edit question", () => this.actions.edit(this)),
    );
  }

  /** Bring the element up to date. live: as it is being written; last: whether it is the consultation's last turn. */
  update({ live = false, last = false } = {}) {
    const { turn } = this;
    const ended = turn.end !== null;
    this.element.classList.toggle("writing", !ended);
    this.showNotices(live);
    this.showText();
    if (live) this.speak(ended);
    const left = turn.leftOut;
    const forgotten = left
      ? `The oldest ${left === 1 ? "turn was" : `${left} turns were`} left out: the conversation is longer than the model can read.`
      : "";
    this.status.textContent = [forgotten, ENDINGS[turn.end] ?? (ended ? "" : turn.answer ? "" : "Reading …")]
      .filter(Boolean)
      .join(" ");
    this.showError(last);
    if (ended) this.showSources();
    this.showButtons(ended, last);
  }

  showNotices(live) {
    for (const [place, texts] of [
      [this.before, this.turn.before],
      [this.after, this.linesAfter()],
    ]) {
      place.append(...texts.slice(place.childNodes.length).map((text) => notice(text, live)));
    }
  }

  linesAfter() {
    return linesOf(this.turn.after, usable(this.turn.rows));
  }

  showText() {
    const rows = usable(this.turn.rows);
    const unsourced = unsourcedNames(this.linesAfter());
    const cite = (id) => {
      const row = rows.get(id);
      if (!row) return null;
      const label = `DB ${id}, ${plain(row.name ?? "")}: open the entry`;
      return el(
        "button",
        { type: "button", class: "cite", "aria-label": label, onclick: () => this.openCard(id) },
        `DB ${id}`,
      );
    };
    show(this.text, this.turn.answer, { cite, unsourced, version: `${[...rows.keys()]} ${unsourced}` });
  }

  /** Whole sentences for a screen reader, never half words. */
  speak(ended) {
    const fresh = this.turn.answer.slice(this.spoken);
    const until = ended ? fresh.length : Math.max(...[". ", "! ", "? ", "\n"].map((end) => fresh.lastIndexOf(end))) + 1;
    if (until > 0 && fresh.slice(0, until).trim()) say(fresh.slice(0, until).replace(/[*_`#]+/g, ""));
    this.spoken += Math.max(until, 0);
  }

  showSources() {
    const known = usable(this.turn.rows);
    const cited = new Set([...citedIn(this.turn.answer)].filter((id) => known.has(id)));
    const state = `${[...known.keys()]} ${[...cited]}`;
    if (state === this.sourcesShown) return; // cards that are open stay so
    this.sourcesShown = state;
    const { section, cards } = sources(this.turn.rows, cited);
    this.cards = cards;
    this.sources.replaceChildren(...(known.size ? [section] : []));
  }

  openCard(id) {
    if (!this.cards.has(id)) this.showSources();
    const card = this.cards.get(id);
    for (let outer = card; outer; outer = outer.parentElement.closest("details")) outer.open = true;
    card.querySelector("summary").focus({ preventScroll: true });
    card.scrollIntoView({ block: "nearest" });
  }

  /** One line on what went wrong; after the seconds that the server asks for, a button to try again. */
  showError(last) {
    clearInterval(this.timer);
    this.error.hidden = !this.turn.trouble;
    if (!this.turn.trouble) return;
    const again = el("button", { type: "button", onclick: () => this.actions.retry(this) }, "Try again");
    const text = el("span", {}, this.turn.trouble);
    this.error.replaceChildren(icon("alert"), text, ...(last ? [again] : []));
    let seconds = Math.ceil(((this.turn.retryAt ?? 0) - Date.now()) / 1000);
    const count = () => {
      again.disabled = seconds > 0;
      again.textContent = seconds > 0 ? `Try again in ${seconds} s` : "Try again";
      if (seconds <= 0) clearInterval(this.timer);
      seconds -= 1;
    };
    count();
    if (seconds >= 0) this.timer = setInterval(count, 1000);
  }

  showButtons(ended, last) {
    const { turn } = this;
    const rated = turn.rating?.rating;
    const rateable = ended && turn.answer && this.feedback();
    const state = JSON.stringify([ended, last, turn.answer === "", turn.trouble, rateable, turn.rating]);
    if (state === this.buttonsShown) return; // what has the focus keeps it
    this.buttonsShown = state;
    const wanted = [
      ended && turn.answer && this.button("copy", "Copy answer", () => this.actions.copy(this)),
      ended && last && !turn.trouble && this.button("retry", "Answer anew", () => this.actions.retry(this)),
      rateable && this.button("good", "Good answer", () => this.actions.rate(this, "good"), rated === "good"),
      rateable && this.button("bad", "Bad answer", () => this.actions.rate(this, "bad"), rated === "bad"),
    ].filter(Boolean);
    const focused = this.buttons.contains(document.activeElement)
      ? document.activeElement.getAttribute("aria-label")
      : null;
    this.buttons.replaceChildren(
      ...wanted,
      ...(turn.rating?.id ? [el("span", { class: "hint" }, `Kept as rating ${turn.rating.id}`)] : []),
    );
    wanted.find((button) => button.getAttribute("aria-label") === focused)?.focus();
  }

  button(name, label, onclick, pressed) {
    return el(
      "button",
      {
        type: "button",
        class: "icon",
        "aria-label": label,
        title: label,
        "aria-pressed": pressed === undefined ? null : String(pressed),
        onclick,
      },
      icon(name),
    );
  }

  /** The question in a box to be changed; sent(text) takes what it has become. after: turns that will go. */
  editQuestion(after, sent) {
    const box = el("textarea", { rows: "3", maxlength: "20000", "aria-label": "Edit question" });
    box.value = this.turn.question;
    const leave = () => {
      this.showQuestion();
      this.question.querySelector("button").focus();
    };
    const send = () => {
      if (box.value.trim()) sent(box.value.trim());
    };
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") leave();
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send();
      }
    });
    this.question.replaceChildren(
      box,
      el(
        "p",
        { class: "hint" },
        after
          ? `Sending it removes the ${after === 1 ? "turn" : `${after} turns`} below.`
          : "Sending it replaces the answer.",
      ),
      el(
        "div",
        { class: "buttons" },
        el("button", { type: "button", class: "primary", onclick: send }, "Send"),
        el("button", { type: "button", onclick: leave }, "Cancel"),
      ),
    );
    box.focus();
  }
}
