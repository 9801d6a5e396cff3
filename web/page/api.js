// What the page asks of the server, and no other: OpenAI's chat completions with their "chatdoctor" object, and ratings.

const KEY = "chatdoctor.key";

/** A line for the user on why there is no answer. retryAfter: seconds, where the server names them. */
export class Refusal extends Error {
  constructor(message, { status = 0, retryAfter = 0 } = {}) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

let unkept = null; // the key, where the browser keeps nothing for a tab

/** The key of this tab; null forgets it. */
export function setKey(key) {
  unkept = key;
  try {
    if (key === null) sessionStorage.removeItem(KEY);
    else sessionStorage.setItem(KEY, key);
  } catch {
    // It lasts until the page is left.
  }
}

function headers() {
  let key = unkept;
  try {
    key ??= sessionStorage.getItem(KEY);
  } catch {
    // As above.
  }
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

/** What model answers here: {model, description, context, disclaimer, diseases, feedback}. */
export async function about() {
  return (await ask("GET", "api/about")).json();
}

/** Have a rated answer kept: {id, receipt}, the number it is kept as and what takes it back. */
export async function rate(rating) {
  return (await ask("POST", "api/feedback", rating)).json();
}

/** Erase the rating of a receipt; how many that were, 0 if the server does not have it. */
export async function takeBack(receipt) {
  return (await (await ask("DELETE", `api/feedback/${encodeURIComponent(receipt)}`)).json()).erased;
}

/**
 * An answer as it is written: parts {text, before, rows, after, leftOut, end}, each with what has come of them.
 * Refusal if there is none, or if it breaks off; what signal aborts ends with an AbortError.
 */
export async function* answer(request, signal) {
  const response = await ask("POST", "v1/chat/completions", { ...request, stream: true }, signal);
  for await (const data of events(response, signal)) {
    if (data === "[DONE]") return;
    yield part(data);
  }
  throw new Refusal("The connection was cut before the answer was complete. What had arrived is kept.");
}

function part(data) {
  let chunk;
  try {
    chunk = JSON.parse(data);
  } catch {
    throw new Refusal("The server sent something that is no answer.");
  }
  if (chunk.error) throw new Refusal(oneLine(chunk.error.message) || "The model could not go on.");
  const choice = chunk.choices?.[0];
  const extra = chunk.chatdoctor ?? {};
  return {
    text: choice?.delta?.content ?? "",
    before: extra.before ?? [],
    rows: extra.rows ?? [],
    after: extra.after ?? [],
    leftOut: extra.left_out_turns ?? 0,
    end: choice?.finish_reason ?? null,
  };
}

async function ask(method, path, body, signal) {
  let response;
  try {
    response = await fetch(path, {
      method,
      headers: headers(),
      body: body && JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Refusal("The server cannot be reached. Is it still running?");
  }
  if (response.ok) return response;
  throw await refusal(response);
}

async function refusal(response) {
  const retryAfter = Math.min(Math.max(Number(response.headers.get("Retry-After")) || 0, 0), 600);
  let message = "";
  try {
    message = oneLine((await response.json()).error.message);
  } catch {
    // Not every answer on the way is the server's own.
  }
  const standard = {
    401: "This server asks for a key.",
    429: "The server is busy with other questions.",
    503: "The server is not ready to answer.",
  };
  const text = standard[response.status] ?? (message || `The server answered with status ${response.status}.`);
  return new Refusal(text, { status: response.status, retryAfter });
}

function oneLine(text) {
  return typeof text === "string" ? text.replace(/\s+/g, " ").trim().slice(0, 400) : "";
}

/** The data of server-sent events. */
async function* events(response, signal) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      let read;
      try {
        read = await reader.read();
      } catch (error) {
        if (signal?.aborted) throw error;
        return;
      }
      rest += decoder.decode(read.value ?? new Uint8Array(), { stream: !read.done });
      // A carriage return at the end may be the first half of a line's end.
      const lines = rest.split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
      if (read.done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
