// One question at a time: it is asked, its answer taken in as it comes, and both kept.

import { about, answer, Refusal, setKey } from "./api.js";
import { byId, open, say } from "./dom.js";
import * as store from "./store.js";

const KEEP_EVERY = 1000; // milliseconds between two savings of an answer that is being written

let known = null; // what /api/about says, once it could be asked
let current = null; // {turn, consultation, abort} of the answer that is being written

/** What the server says of itself, null before it could be asked. */
export const server = () => known;

/** The turn and the consultation that are being written, or null. */
export const writing = () => current;

export function stop() {
  current?.abort.abort();
}

/** Stop, and keep nothing of the consultation. */
export function abandon() {
  if (!current) return;
  current.consultation.erased = true;
  stop();
}

/** Ask the server what it is. tell: {began, changed(turn, live), kept, connected, ended}, what the page does then. */
export async function connect(tell) {
  known = await about();
  tell.connected();
}

/** Have a question answered, as the next turn of a consultation. */
export async function ask(consultation, question, tell) {
  if (current) return;
  const turn = store.newTurn(question);
  const messages = [...messagesOf(consultation.turns), { role: "user", content: question }];
  consultation.turns.push(turn);
  current = { turn, consultation, abort: new AbortController() };
  tell.began();
  keep(consultation, tell);
  try {
    await withKey(() => write(messages, tell));
  } catch (error) {
    end(turn, error);
  }
  current = null;
  keep(consultation, tell);
  tell.changed(turn, true);
  tell.ended();
}

async function write(messages, tell) {
  if (!known) await connect(tell);
  const { turn, consultation, abort } = current;
  const card = store.patient();
  const request = { model: known.model, messages, ...(Object.keys(card).length ? { patient: card } : {}) };
  let kept = Date.now();
  let drawing = false;
  for await (const part of answer(request, abort.signal)) {
    turn.answer += part.text;
    turn.before.push(...part.before.map(String));
    turn.rows.push(...part.rows);
    turn.after.push(...part.after.map(String));
    turn.leftOut = Math.max(turn.leftOut, part.leftOut);
    turn.end = part.end ?? turn.end;
    if (part.before.length) tell.changed(turn, true);
    else if (!drawing) {
      drawing = true;
      requestAnimationFrame(() => {
        drawing = false;
        if (turn.end === null) tell.changed(turn, true);
      });
    }
    if (Date.now() - kept > KEEP_EVERY) {
      keep(consultation, tell);
      kept = Date.now();
    }
  }
  turn.end ??= "stop";
}

/** How a turn ends that did not come to its end. */
function end(turn, error) {
  if (current.abort.signal.aborted) {
    turn.end = "stopped";
    return;
  }
  turn.end = turn.answer ? "cut" : "failed";
  turn.trouble = error instanceof Refusal ? error.message : "Something went wrong on this page.";
  if (error.retryAfter) turn.retryAt = Date.now() + 1000 * error.retryAfter;
  if (!(error instanceof Refusal)) console.error(error);
  say(turn.trouble);
}

export function keep(consultation, tell) {
  if (consultation.erased) return;
  consultation.changed = Date.now();
  store.keep(consultation);
  tell.kept();
}

/** The turns that count, as messages: a question without an answer is none of the conversation. */
export function messagesOf(turns) {
  return turns
    .filter((turn) => turn.answer.trim())
    .flatMap((turn) => [
      { role: "user", content: turn.question },
      { role: "assistant", content: turn.answer.trimEnd() },
    ]);
}

/** Do what asks the server; where it wants a key, ask for one and do it again. */
export async function withKey(what) {
  for (
    let why = "This server asks for a key. It is kept until this tab is closed.";
    ;
    why = "The server does not accept this key."
  ) {
    try {
      return await what();
    } catch (error) {
      if (error.status !== 401) throw error;
      setKey(null);
      byId("key-why").textContent = why;
      byId("key-value").value = "";
      if ((await open(byId("key"))) !== "send") throw error;
      setKey(byId("key-value").value.trim());
      byId("key-value").value = "";
    }
  }
}
