// Texts of strangers as nodes: never markup. What is invisible, or turns the order of letters round, is shown as a marked box.

import { html, useState } from "./vendor/preact-htm.js";
import { api } from "./api.js";
import { differences } from "./compare.js";

const INVISIBLE =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\ufff9-\ufffb]|\udb40[\udc00-\udc7f]/g;
const MAX_LINES = 400; // a node each; beyond, one block

function marked(text) {
  const out = [];
  let at = 0;
  for (const match of text.matchAll(INVISIBLE)) {
    if (match.index > at) out.push(text.slice(at, match.index));
    const code = "U+" + match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    out.push(html`<span class="box" title="an invisible character">${code}</span>`);
    at = match.index + match[0].length;
  }
  if (at < text.length) out.push(text.slice(at));
  return out;
}

function Lines({ text, raw }) {
  const lines = text.split("\n");
  const show = (one) => (raw ? one : marked(one));
  if (lines.length > MAX_LINES) return html`<div class="lines" dir="auto">${show(text)}</div>`;
  return html`<div class="lines">${lines.map((line) => html`<div dir="auto">${line === "" ? "\u00a0" : show(line)}</div>`)}</div>`;
}

function Differences({ text, beside }) {
  const found = differences(text, beside);
  if (!found) return html`<p class="soft">Too long to be compared word by word.</p><${Lines} text=${text} />`;
  return html`<div class="lines" dir="auto">${found.map((piece) => (piece.same ? marked(piece.text) : html`<mark>${marked(piece.text)}</mark>`))}</div>`;
}

// A long text unfolds piece by piece: `more(from)` is the address of the rest. What `beside` does not say is marked.
export function Text({ text, length, more, beside }) {
  const [extra, setExtra] = useState("");
  const [raw, setRaw] = useState(false);
  const [failed, setFailed] = useState("");
  const whole = text + extra;
  const left = (length || text.length) - [...whole].length;
  const unfold = async () => {
    try {
      const piece = await api("GET", more([...whole].length));
      setExtra(extra + piece.text);
      setFailed("");
    } catch (error) {
      setFailed(error.message);
    }
  };
  return html`<div class="said">
    ${beside === undefined ? html`<${Lines} text=${whole} raw=${raw} />` : html`<${Differences} text=${whole} beside=${beside} />`}
    ${left > 0 &&
    more &&
    html`<button class="link" onClick=${unfold}>Show more (${left.toLocaleString("en")} characters)</button>${failed && html`<span class="bad"> ${failed}</span>`}`}
    ${whole.search(INVISIBLE) >= 0 &&
    html`<button class="link" onClick=${() => setRaw(!raw)} aria-pressed=${raw}>${raw ? "Mark invisible characters" : "Show as it is"}</button>`}
  </div>`;
}

// A short text of a stranger on one line.
export const Short = ({ text }) => html`<bdi>${marked(String(text))}</bdi>`;

// A time of the server, which is UTC, as this browser's clock shows it.
export function When({ at }) {
  const time = new Date(at);
  if (isNaN(time.getTime())) return at;
  return html`<time datetime=${at} title=${at}>${time.toLocaleString("en-GB", { day: "numeric", month: "short", year: "numeric", hour: "2-digit", minute: "2-digit" })}</time>`;
}

const WHO = { system: "System", user: "User", assistant: "Assistant", tool: "Tool" };

export function Conversation({ messages, more }) {
  return messages.map(
    (message, i) => html`<div class="turn ${message.role === "user" ? "of-user" : ""}" key=${i}>
      <div class="who">${WHO[message.role] || "Other"}</div>
      <${Text} text=${message.text} length=${message.length} more=${more && ((from) => more(i, from))} />
    </div>`,
  );
}
