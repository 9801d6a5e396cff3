// How the page is built: elements from text. No file of this page turns a string into markup.

// Control characters, and those that reorder what stands around them: shown as such, as the terminal does.
const CONTROL = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g;

const ICONS = {
  alert: "M12 4 2.8 19.5h18.4zM12 10v4.5M12 17v.3",
  close: "M6 6l12 12M18 6 6 18",
  copy: "M9 9h10v10H9zM5 15V5h10",
  down: "M12 5v13M6 12.5l6 6 6-6",
  edit: "M5 19l1-4L16 5l3 3L9 18zM14 7l3 3",
  good: "M7 11v8H4v-8zM7 11l4-7c1.5 0 2.5 1 2.2 2.6L12.6 10H18c1.2 0 2 1 1.7 2.2l-1.4 5.3c-.2.9-1 1.5-2 1.5H7",
  bad: "M17 13V5h3v8zM17 13l-4 7c-1.5 0-2.5-1-2.2-2.6l.6-3.4H6c-1.2 0-2-1-1.7-2.2l1.4-5.3C5.9 5.6 6.7 5 7.7 5H17",
  lock: "M6 11h12v9H6zM8.5 11V8a3.5 3.5 0 0 1 7 0v3",
  menu: "M4 7h16M4 12h16M4 17h16",
  moon: "M19.5 14.5A8 8 0 0 1 9.5 4.5a8 8 0 1 0 10 10z",
  person: "M12 12a4 4 0 1 0 0-8 4 4 0 0 0 0 8zM4.5 20c.8-4 3.8-5.5 7.5-5.5s6.7 1.5 7.5 5.5",
  plus: "M12 5v14M5 12h14",
  retry: "M19 12a7 7 0 1 1-2.1-5M19 4v4h-4",
  send: "M12 19V6M6 11.5 12 5.5l6 6",
  stop: "M7.5 7.5h9v9h-9z",
  trash: "M5 7h14M10 7V4.5h4V7M7 7l1 13h8l1-13",
};

/** The text as it may be shown. */
export function plain(text) {
  return String(text).replace(/\r\n?/g, "\n").replace(CONTROL, "\ufffd");
}

/** An element; attributes by name, listeners as onclick etc. Children are nodes or texts; null and false are none. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  const some = children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false);
  node.append(...some.map((child) => (child instanceof Node ? child : plain(child))));
  return node;
}

/** A drawing beside a word or a label; screen readers pass over it. */
export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  const path = document.createElementNS(space, "path");
  for (const [key, value] of [
    ["viewBox", "0 0 24 24"],
    ["aria-hidden", "true"],
    ["class", "drawing"],
  ])
    svg.setAttribute(key, value);
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

export function byId(id) {
  return document.getElementById(id);
}

/** Show a <dialog>; resolves to the value of the button that closed it, "" for Escape and Cancel. */
export function open(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true });
  });
}

/** Whether the user wants what cannot be undone. */
export async function sure(title, text, verb = "Erase") {
  byId("sure-title").textContent = plain(title);
  byId("sure-text").textContent = plain(text);
  byId("sure-yes").textContent = verb;
  return (await open(byId("sure"))) === "yes";
}

/** Have a screen reader say a text when it has said what it is saying. */
export function say(text) {
  const line = el("p", {}, text);
  byId("said").append(line);
  setTimeout(() => line.remove(), 20000);
}

/** Once, at the start: drawings where index.html names them, and the buttons that only close their dialog. */
export function furnish() {
  for (const place of document.querySelectorAll("[data-icon]")) place.replaceWith(icon(place.dataset.icon));
  for (const button of document.querySelectorAll("[data-close]")) {
    button.addEventListener("click", () => button.closest("dialog").close(""));
  }
}
