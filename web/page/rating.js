// Ratings and corrected answers: nothing is sent before the user has agreed to its being kept.

import { rate } from "./api.js";
import { byId, open } from "./dom.js";
import { consent, keepConsent, keepReceipt } from "./store.js";

/**
 * Rate an answer; null if the user changes their mind, else {rating, id}. messages end with the question.
 * send(what) does what asks the server.
 */
export async function rated(messages, answer, rating, send) {
  if (!consent()) {
    if ((await open(byId("consent"))) !== "yes") return null;
    keepConsent(true);
  }
  let [reason, correction] = ["", ""];
  if (rating === "bad") {
    const form = byId("rating").querySelector("form");
    form.reset();
    form.correction.value = answer;
    if ((await open(byId("rating"))) !== "send") return null;
    reason = form.reason.value.trim();
    correction = form.correction.value.trim() === answer.trim() ? "" : form.correction.value.trim();
  }
  const { id, receipt } = await send(() => rate({ consent: true, messages, answer, rating, reason, correction }));
  keepReceipt(receipt);
  return { rating, id };
}
