// A conversation with a model: streamed, painted at most 20 times a second, stopped at will. Chat and red team share it.

import { html } from "./vendor/preact-htm.js";
import { lines } from "./api.js";
import { Text } from "./text.js";

const PAINT_MS = 50;

export class Talk {
  constructor(changed) {
    this.changed = changed;
    this.turns = [];
    this.tokens = []; // of the last answer: text, log-probability, others
    this.state = ""; // "", "loading" or "answering"
    this.error = "";
    this.abort = null;
    this.painted = -PAINT_MS;
  }

  get busy() {
    return this.state !== "";
  }

  get answered() {
    const last = this.turns[this.turns.length - 1];
    return !this.busy && last && last.role === "assistant" && last.content !== "";
  }

  paint(now) {
    if (this.timer) return;
    const wait = now ? 0 : Math.max(0, PAINT_MS - (performance.now() - this.painted));
    this.timer = setTimeout(() => {
      this.timer = 0;
      this.painted = performance.now();
      this.changed();
    }, wait);
  }

  stop() {
    if (this.abort) this.abort.abort();
  }

  clear() {
    this.stop();
    this.turns = [];
    this.tokens = [];
    this.error = "";
    this.paint(true);
  }

  // Ask for an answer to the turns so far. What is there when it is stopped stays.
  async ask(options) {
    this.abort = new AbortController();
    const answer = { role: "assistant", content: "" };
    const messages = this.turns.map(({ role, content }) => ({ role, content }));
    if (options.system) messages.unshift({ role: "system", content: options.system });
    this.turns = [...this.turns, answer];
    this.tokens = [];
    this.error = "";
    this.state = "answering";
    this.finish = "";
    this.paint(true);
    const { system, ...sampling } = options;
    try {
      for await (const piece of lines("/chat", { ...sampling, messages }, this.abort.signal)) {
        this.take(piece, answer);
        this.paint();
      }
    } catch (error) {
      if (error.name === "AbortError") this.finish = "stopped";
      else this.error = error.message;
    }
    if (answer.content === "" && !this.error && this.finish !== "stopped") this.finish = "empty";
    if (answer.content === "" && this.turns[this.turns.length - 1] === answer) this.turns = this.turns.slice(0, -1);
    this.state = "";
    this.abort = null;
    this.paint(true);
  }

  take(piece, answer) {
    if (piece.error) this.error = piece.error;
    if (piece.state) this.state = piece.state;
    else this.state = "answering";
    if (piece.text) answer.content += piece.text;
    if (piece.tokens) this.tokens.push(...piece.tokens);
    if (piece.finish) this.finish = piece.finish;
  }
}

export function Turns({ talk, name }) {
  return html`<div class="turns">${talk.turns.map(
    (turn, i) => html`<div class="turn ${turn.role === "user" ? "of-user" : ""}" key=${i}><div class="who">${turn.role === "user" ? "You" : name || "Model"}</div>
      <${Text} text=${turn.content || "\u2026"} /></div>`,
  )}
    <p class="soft" role="status">${talk.state === "loading" ? "The model is loaded \u2026" : talk.busy ? "Answering \u2026" : talk.finish === "length" ? "Cut off at the longest answer." : talk.finish === "stopped" ? "Stopped." : talk.finish === "empty" ? "The model ended its turn without a word." : ""}</p>
    ${talk.error && html`<p class="bad" role="alert">${talk.error}</p>`}
  </div>`;
}

// Every token of the last answer with its log-probability, and what else it could have been.
export function Tokens({ tokens }) {
  if (!tokens.length) return null;
  const shade = (logprob) => Math.min(5, Math.floor(-logprob));
  const mean = tokens.reduce((sum, t) => sum + t[1], 0) / tokens.length;
  return html`<details class="tokens"><summary>${tokens.length} tokens, mean log-probability ${mean.toFixed(2).replace("-0.00", "0.00")}</summary>
    <p class="tokens-text">${tokens.map(
      ([text, logprob, others]) => html`<span class=${`token unsure-${shade(logprob)}`} tabindex="0" title=${[`${JSON.stringify(text)} ${logprob}`, ...others.map(([t, l]) => `${JSON.stringify(t)} ${l}`)].join("\n")}>${text.replaceAll("\n", "\u21b5\n")}</span>`,
    )}</p></details>`;
}
