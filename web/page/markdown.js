// Markdown -> nodes. A model writes it, so it is not trusted: what is no known mark stays text, links and images become
// text with their address, and the only thing to press is a citation, "[DB 712]", of a row that the server sent.

import { el, plain } from "./dom.js";
import { CITATION, idsOf } from "./sources.js";

const DEEPEST = 6; // quotes and lists inside each other
const FENCE = /^ {0,3}(`{3,}|~{3,})/;
const HEADING = /^ {0,3}#{1,6}[ \t]+(.*?)[ \t]*#*$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,12})([-*+•]|\d{1,9}[.)])[ \t]+(?=\S)/;
const ALIGNMENT = /^[ \t]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)+\|?[ \t]*$/;

// No mark reaches further than a line, nor than so many letters: what it costs stays in proportion to the text.
const INLINE = new RegExp(
  [
    /\\(?<escaped>[\\`*_{}[\]()#+\-.!|>~])/,
    /(?<ticks>`{1,2})(?<code>[^\n]{1,600}?)\k<ticks>/,
    CITATION,
    /!?\[(?<label>[^\]\n]{0,300})\]\((?<address>[^()\s]{0,600}(?:\([^()\s]{0,200}\)[^()\s]{0,200})?)(?:[ \t]+[^)\n]{0,200})?\)/,
    /\*\*(?=\S)(?<strong>[^\n]{1,600}?)(?<=\S)\*\*/,
    /(?<!\w)__(?=\S)(?<strong2>[^\n]{1,600}?)(?<=\S)__(?!\w)/,
    /\*(?=[^\s*])(?<em>[^*\n]{1,600}?)(?<=\S)\*/,
    /(?<!\w)_(?=[^\s_])(?<em2>[^_\n]{1,600}?)(?<=\S)_(?!\w)/,
    /~~(?=\S)(?<gone>[^~\n]{1,600}?)(?<=\S)~~/,
    /(?<line>\n)/,
  ]
    .map((part) => part.source)
    .join("|"),
  "g",
);

const shown = new WeakMap(); // container -> the source of each of its blocks

/**
 * Bring a container to show the text; blocks that stay the same are left alone, with their focus and selection.
 * context: {cite(id) -> node or null, unsourced: names to mark, version: changes when one of these does}
 */
export function show(container, text, context) {
  const blocks = parse(plain(text).split("\n"));
  const sources = blocks.map((block) => `${context.version}\n${block.source}`);
  const before = shown.get(container) ?? [];
  let same = 0;
  while (same < before.length && same < sources.length && before[same] === sources[same]) same += 1;
  while (container.childNodes.length > same) container.lastChild.remove();
  container.append(...blocks.slice(same).map((block) => block.build(context)));
  shown.set(container, sources);
}

/** The blocks of some lines: {source, build(context) -> one node}. */
function parse(lines, depth = 0) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const kind = kindOf(lines, at, depth);
    const end = kind.end(lines, at);
    const own = lines.slice(at, end);
    blocks.push({ source: own.join("\n"), build: (context) => kind.build(own, context, depth) });
    at = end;
  }
  return blocks;
}

function kindOf(lines, at, depth) {
  const line = lines[at];
  if (FENCE.test(line)) return CODE;
  if (HEADING.test(line)) return TITLE;
  if (RULE.test(line)) return LINE;
  if (depth < DEEPEST && QUOTE.test(line)) return CITED;
  if (depth < DEEPEST && ITEM.test(line)) return LIST;
  if (line.includes("|") && at + 1 < lines.length && ALIGNMENT.test(lines[at + 1])) return TABLE;
  return TEXT;
}

const one = (_, at) => at + 1;

const TITLE = { end: one, build: ([line], context) => el("h3", {}, inline(line.match(HEADING)[1], context)) };

const LINE = { end: one, build: () => el("hr") };

const CODE = {
  end(lines, at) {
    const fence = lines[at].match(FENCE)[1];
    const closing = lines.findIndex((line, i) => i > at && line.trim().startsWith(fence));
    return closing < 0 ? lines.length : closing + 1;
  },
  build(lines) {
    const closed = lines.length > 1 && FENCE.test(lines.at(-1));
    return el("pre", { tabindex: "0" }, el("code", {}, lines.slice(1, closed ? -1 : undefined).join("\n")));
  },
};

const CITED = {
  end: (lines, at) => first(lines, at, (line) => !QUOTE.test(line)),
  build: (lines, context, depth) =>
    el(
      "blockquote",
      {},
      parse(
        lines.map((line) => line.replace(QUOTE, "")),
        depth + 1,
      ).map((b) => b.build(context)),
    ),
};

const LIST = {
  end(lines, at) {
    const ordered = isOrdered(lines[at]);
    return first(lines, at, (line, i) => {
      if (!line.trim()) return !(lines[i + 1] && (ITEM.test(lines[i + 1]) || /^ {2,}\S/.test(lines[i + 1])));
      const item = line.match(ITEM);
      return item ? item[1].length < 2 && isOrdered(line) !== ordered : !/^ {2,}/.test(line) && !lines[i - 1].trim();
    });
  },
  build(lines, context, depth) {
    const indent = lines[0].match(ITEM)[1].length;
    const items = [];
    for (const line of lines) {
      const item = line.match(ITEM);
      if (item && item[1].length <= indent + 1) items.push([line.slice(item[0].length)]);
      else items.at(-1).push(line.replace(/^ {1,4}/, ""));
    }
    const start = isOrdered(lines[0]) ? parseInt(lines[0].match(ITEM)[2], 10) : 1;
    const built = items.map((own) =>
      el(
        "li",
        {},
        parse(own, depth + 1).map((block) => unwrapped(block.build(context))),
      ),
    );
    return el(isOrdered(lines[0]) ? "ol" : "ul", start === 1 ? {} : { start }, built);
  },
};

const TABLE = {
  end: (lines, at) => first(lines, at, (line) => !line.includes("|")),
  build([head, , ...body], context) {
    const row = (line, tag) =>
      el(
        "tr",
        {},
        cells(line).map((cell) => el(tag, {}, inline(cell, context))),
      );
    const table = el(
      "table",
      {},
      el("thead", {}, row(head, "th")),
      el(
        "tbody",
        {},
        body.map((line) => row(line, "td")),
      ),
    );
    return el("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Table" }, table);
  },
};

const TEXT = {
  end: (lines, at) => first(lines, at, (line, i) => !line.trim() || kindOf(lines, i, 0) !== TEXT),
  build: (lines, context) => el("p", {}, inline(lines.map((line) => line.trim()).join("\n"), context)),
};

function first(lines, at, ends) {
  let i = at + 1;
  while (i < lines.length && !ends(lines[i], i)) i += 1;
  return i;
}

function isOrdered(line) {
  return /\d/.test(line.match(ITEM)[2]);
}

function cells(line) {
  return line
    .trim()
    .replace(/^\||\|$/g, "")
    .split("|")
    .map((cell) => cell.trim());
}

/** A paragraph that stands alone in a list's item is its text. */
function unwrapped(node) {
  return node.tagName === "P" ? [...node.childNodes] : node;
}

/** A line's marks as nodes. */
function inline(text, context) {
  const nodes = [];
  let at = 0;
  for (const match of text.matchAll(INLINE)) {
    nodes.push(...words(text.slice(at, match.index), context));
    nodes.push(...marked(match, context));
    at = match.index + match[0].length;
  }
  return [...nodes, ...words(text.slice(at), context)];
}

function marked(match, context) {
  const g = match.groups;
  if (g.escaped !== undefined) return [g.escaped];
  if (g.code !== undefined) return [el("code", {}, g.code)];
  if (g.cited !== undefined)
    return idsOf(g.cited).map((id) => context.cite(id) ?? el("span", { class: "missing" }, `[DB ${id}: not given]`));
  if (g.address !== undefined) return [...inline(g.label, context), g.address ? ` (${g.address})` : ""];
  if (g.line !== undefined) return [el("br")];
  if (g.gone !== undefined) return [el("s", {}, inline(g.gone, context))];
  const strong = g.strong ?? g.strong2;
  return [el(strong === undefined ? "em" : "strong", {}, inline(strong ?? g.em ?? g.em2, context))];
}

/** Text without marks, in which names without a source are pointed out. */
function words(text, context) {
  if (!text || !context.unsourced.length) return text ? [text] : [];
  const names = context.unsourced.map((name) => name.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&"));
  const parts = text.split(new RegExp(`(?<![\\p{L}\\d])(${names.join("|")})(?![\\p{L}\\d])`, "giu"));
  return parts.map((part, i) =>
    i % 2 ? el("mark", { class: "unsourced" }, part, el("span", { class: "visually-hidden" }, " (unsourced)")) : part,
  );
}
