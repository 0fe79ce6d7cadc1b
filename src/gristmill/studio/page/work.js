// Rating and comparing. The queue, the drafts and the answers on their way live here, outside of the view: a key acts on this state at
// once, however late the page is painted.

import { html, useEffect } from "./vendor/preact-htm.js";
import { api, uuid } from "./api.js";
import { query } from "./early.js";
import { Conversation, Short, Text } from "./text.js";
import { ATTRIBUTES, CheckPanel, ComparePanel, LETTERS, RatePanel, Reason, STRENGTHS, VERDICTS, complete, content } from "./panels.js";

const AHEAD = 10; // items that the page holds: enough for half a minute without a network
const RENEW_SECONDS = 120;
const IDLE_SECONDS = 300; // without a key or click, after which items go back when their leases end
const MAX_REPAIR_CHARS = 100_000; // of a text that the server takes
const SET = 20; // items of a set, whose progress is shown
const UNDOS = 20;
export const SKIPS = ["broken", "not English", "pii", "unsafe", "unsure"];

export class Work {
  constructor(me, project, outbox, changed) {
    this.me = me;
    this.project = project;
    this.outbox = outbox;
    this.changed = changed;
    this.items = [];
    this.drafts = {};
    this.versions = {};
    this.answered = new Set();
    this.undone = [];
    this.cursor = 0;
    this.keys = 0;
    this.started = performance.now();
    this.active = performance.now();
    this.before = undefined; // answers of this person that this visit does not count
    this.count = 0; // in this visit
    this.panel = ""; // "skip" or "help"
    this.loading = false;
    this.error = "";
    this.notice = "";
    this.auto = localStorage.getItem("studio:auto") !== "off";
    this.keysOn = localStorage.getItem("studio:keys") !== "off";
    this.channel = "BroadcastChannel" in window ? new BroadcastChannel("studio") : null;
    if (this.channel) this.channel.onmessage = (event) => this.elsewhere(event.data);
    this.timer = setInterval(() => this.renew(), RENEW_SECONDS * 1000);
    this.onKey = (event) => this.key(event);
    document.addEventListener("keydown", this.onKey);
    this.fill();
  }

  close() {
    clearInterval(this.timer);
    document.removeEventListener("keydown", this.onKey);
    if (this.channel) this.channel.close();
    this.closed = true;
  }

  get item() {
    return this.items[0];
  }

  get draft() {
    return (this.item && this.drafts[this.item.id]) || {};
  }

  async fill() {
    if (this.loading || this.closed || this.items.length >= AHEAD) return;
    this.loading = true;
    try {
      const known = this.outbox.waiting ? -1 : this.count;
      const n = Math.min(20, AHEAD + this.outbox.waiting);
      const found = await api("GET", "/queue?" + query({ project: this.project.id, n }));
      const held = new Set([...this.items.map((item) => item.id), ...this.answered]);
      const first = this.items.length === 0;
      for (const item of found.items) {
        if (held.has(item.id)) continue;
        this.items.push(item);
        this.drafts[item.id] = this.load(item.id);
      }
      this.guideline = found.guideline;
      if (this.before === undefined || known === this.count) this.before = Math.max(0, found.progress.answered - Math.max(0, known));
      if (first && this.items.length) this.begin();
      this.error = "";
    } catch (error) {
      this.error = error.message;
      if (error.status === 401) this.outbox.tell.ended();
      else setTimeout(() => this.fill(), 2000);
    } finally {
      this.loading = false;
      if (!this.closed) this.changed();
    }
  }

  // ---- drafts: a state of this page, never sent by themselves ----

  key_of(item) {
    return `studio:draft:${this.me.id}:${item}`;
  }

  load(item) {
    try {
      return JSON.parse(localStorage.getItem(this.key_of(item))) || {};
    } catch {
      return {};
    }
  }

  save(item) {
    try {
      localStorage.setItem(this.key_of(item), JSON.stringify(this.drafts[item]));
    } catch {
      // full or forbidden: the draft is still in this page
    }
  }

  begin() {
    this.started = performance.now();
    this.keys = 0;
    const missing = ATTRIBUTES.findIndex((name) => this.draft[name] === undefined);
    this.cursor = missing < 0 ? ATTRIBUTES.length - 1 : missing;
  }

  // ---- what a person does ----

  value(name, value, byKey) {
    const item = this.item;
    if (!item) return;
    const repairs = name === "verdict" && value === "repair";
    if (repairs && this.draft.text === undefined) return this.repair(item, byKey);
    const draft = { ...this.draft, [name]: value };
    if (name === "preference") draft.neither = false;
    if (name === "neither") delete draft.preference;
    this.drafts[item.id] = draft;
    this.save(item.id);
    this.notice = "";
    const place = ATTRIBUTES.indexOf(name);
    if (place >= 0) this.cursor = Math.min(place + 1, ATTRIBUTES.length - 1);
    const ends = { pair: ["preference", "neither"], check: ["verdict"], rate: ATTRIBUTES.slice(-1) };
    const last = ends[item.kind].includes(name) && !repairs;
    if (byKey && this.auto && last && complete(item.kind, draft)) this.submit();
    if (byKey && repairs) setTimeout(() => document.getElementById("repair")?.focus(), 0);
    this.changed();
  }

  // Repairing begins with the whole answer; the server sends a long one in pieces.
  async repair(item, byKey) {
    const [answer] = item.answers;
    const { verdict } = this.draft;
    let { text } = answer;
    try {
      if (answer.length > MAX_REPAIR_CHARS) throw new Error("it is too long: accept or reject it");
      while ([...text].length < answer.length) {
        this.notice = "Loading the whole answer \u2026";
        this.changed();
        text += (await api("GET", textOf(item)(item.messages.length, [...text].length))).text;
      }
    } catch (error) {
      this.notice = `This answer cannot be repaired now: ${error.message}`;
      return this.changed();
    }
    if (this.item !== item || this.draft.verdict !== verdict) return; // decided otherwise meanwhile
    this.drafts[item.id] = { ...this.draft, text };
    this.value("verdict", "repair", byKey);
  }

  submit() {
    const item = this.item;
    if (!item) return;
    if (!complete(item.kind, this.draft)) {
      const missing = { rate: "Rate all five attributes first.", pair: "Choose one of the eight first.", check: "Choose one of the three first." };
      this.notice = this.draft.verdict === "repair" ? "Write the answer as it should be first." : missing[item.kind];
      this.changed();
      return;
    }
    const said = content(item.kind, this.draft);
    const version = (this.versions[item.id] || 0) + 1;
    this.versions[item.id] = version;
    const seconds = Math.round((performance.now() - this.started) / 100) / 10;
    const answer = { id: uuid(), item: item.id, version, content: said, seconds, keys: this.keys, guideline: this.guideline };
    this.leave(item, { item, draft: this.draft });
    if (version === 1) this.count++;
    this.outbox.add("answer", answer);
  }

  skip(kind) {
    const item = this.item;
    if (!item) return;
    this.panel = "";
    this.leave(item, { item, draft: this.draft, flag: true });
    this.outbox.add("flag", { item: item.id, kind, note: "" });
  }

  leave(item, undo) {
    this.undone = [...this.undone, undo].slice(-UNDOS);
    this.answered.add(item.id);
    this.items = this.items.filter((one) => one !== item);
    localStorage.removeItem(this.key_of(item.id));
    delete this.drafts[item.id];
    this.notice = "";
    if (this.channel) this.channel.postMessage({ item: item.id, person: this.me.id });
    this.begin();
    this.changed();
    this.fill();
  }

  undo() {
    const last = this.undone.pop();
    if (!last) return;
    this.items = [last.item, ...this.items];
    this.drafts[last.item.id] = last.draft;
    if (last.flag) {
      this.answered.delete(last.item.id);
      this.outbox.add("flag", { item: last.item.id, undo: true });
    }
    this.begin();
    this.notice = "Taken back: change it and submit it again.";
    this.changed();
  }

  elsewhere({ item, person }) {
    if (person !== this.me.id || !this.items.some((one) => one.id === item)) return;
    if (this.item.id === item) this.notice = "You have answered the item before in another tab.";
    this.answered.add(item);
    this.items = this.items.filter((one) => one.id !== item);
    this.begin();
    this.changed();
    this.fill();
  }

  async renew() {
    if (performance.now() - this.active > IDLE_SECONDS * 1000 || !this.items.length) return;
    try {
      const { items } = await api("POST", "/leases/renew", { items: this.items.map((item) => item.id) });
      const held = new Set(items);
      this.items = this.items.filter((item, i) => i === 0 || held.has(item.id) || this.versions[item.id]);
      this.changed();
    } catch {
      // without a network the leases run out; what is answered anyway is stored
    }
    this.fill();
  }

  toggle(name, on) {
    this[name === "auto" ? "auto" : "keysOn"] = on;
    localStorage.setItem(`studio:${name}`, on ? "on" : "off");
    this.changed();
  }

  show(panel) {
    this.panel = this.panel === panel ? "" : panel;
    this.changed();
  }

  key(event) {
    this.active = performance.now();
    const target = event.target;
    const typing = target.closest && target.closest("textarea, select, [contenteditable], input:not([type=radio]):not([type=checkbox])");
    if (event.ctrlKey || event.altKey || event.metaKey || event.isComposing) return;
    const key = event.key;
    if (key === "Escape") {
      if (typing) target.blur();
      if (this.panel) this.show("");
      return;
    }
    if (typing || !this.keysOn) return;
    if (key === "Enter" && target.closest && target.closest("button, a, summary")) return;
    if (this.act(key)) event.preventDefault();
  }

  act(key) {
    if (key === "?") return this.show("help"), true;
    if (key === "u") return this.undo(), true;
    if (!this.item) return false;
    if (this.panel === "skip") {
      const place = Number(key) - 1;
      if (SKIPS[place]) return this.skip(SKIPS[place]), true;
      if (key !== "x") return false;
    }
    if (key === "x") return this.show("skip"), true;
    if (key === "Enter") return this.submit(), true;
    if (this.item.kind === "check") {
      const verdict = VERDICTS[Number(key) - 1];
      if (!verdict) return false;
      this.keys++;
      this.value("verdict", verdict, true);
      return true;
    }
    if (this.item.kind === "pair") {
      const strength = STRENGTHS[Number(key) - 1];
      if (/^[1-7]$/.test(key)) return this.keys++, this.value("preference", strength, true), true;
      if (key === "n") return this.keys++, this.value("neither", true, true), true;
      return false;
    }
    const level = /^[0-4]$/.test(key) ? Number(key) : key.length === 1 ? LETTERS.indexOf(key) : -1;
    if (level >= 0) return this.keys++, this.value(ATTRIBUTES[this.cursor], level, true), true;
    if (key === "e") return this.value("unsafe", !this.draft.unsafe), true;
    if (key === "Backspace") return (this.cursor = Math.max(0, this.cursor - 1)), this.changed(), true;
    return false;
  }
}

// Where a piece of an item's long text is.
const textOf = (item) => (part, from) => `/items/${item.id}/text?` + query({ part, from });

const RATE_KEYS = [
  ["0 - 4", "rate the marked attribute, and go on"],
  ["a s d f g", "the same, as 0 to 4"],
  ["Backspace", "back to the attribute before"],
  ["e", "unsafe"],
];
const PAIR_KEYS = [
  ["1 - 7", "from: left is much better, to: right is much better"],
  ["n", "neither is acceptable"],
];
const CHECK_KEYS = [
  ["1", "accept"],
  ["2", "repair: Escape leaves the text, Enter submits"],
  ["3", "reject"],
];
const KEYS = { rate: RATE_KEYS, pair: PAIR_KEYS, check: CHECK_KEYS };
const VERB = { rate: "Rate", pair: "Compare", check: "Check" };
const BOTH_KEYS = [
  ["Enter", "submit"],
  ["u", "take the last answer back"],
  ["x", "skip, with a reason"],
  ["?", "show or hide the keys"],
];

function Help({ work, kind }) {
  return html`<section class="card help" aria-label="Keys">
    <dl>${[...KEYS[kind], ...BOTH_KEYS].map(([key, what]) => html`<div><dt><kbd>${key}</kbd></dt><dd>${what}</dd></div>`)}</dl>
    <label class="check"><input type="checkbox" checked=${work.keysOn} onChange=${(e) => work.toggle("keys", e.target.checked)} /> single keys act</label>
    <label class="check"><input type="checkbox" checked=${work.auto} onChange=${(e) => work.toggle("auto", e.target.checked)} /> the last key submits</label>
  </section>`;
}

function Skip({ work }) {
  return html`<section class="card skip" aria-label="Skip this item">
    <p>Why can it not be judged?</p>
    <div class="buttons">${SKIPS.map((kind, i) => html`<button onClick=${() => work.skip(kind)}>${kind} <kbd aria-hidden="true">${i + 1}</kbd></button>`)}</div>
  </section>`;
}

function Progress({ work }) {
  const done = work.count % SET || (work.count ? SET : 0);
  return html`<div class="progress"><progress max=${SET} value=${done} aria-label="Progress of this set"></progress>
    <span>${done} of ${SET} in this set</span><span class="soft">${(work.before || 0) + work.count} answered in all</span></div>`;
}

export function WorkView({ work }) {
  const item = work.project.decided ? undefined : work.item;
  const kind = work.project.kind;
  useEffect(() => {
    document.title = item ? `${VERB[kind]} ${item.id.slice(0, 6)} - Studio` : `${work.project.name} - Studio`;
    const top = document.querySelector(".work");
    if (top && top.getBoundingClientRect().top < 0) top.scrollIntoView();
  }, [item && item.id]);
  const more = item && textOf(item);
  const set = (name, value) => work.value(name, value, false);
  const controls =
    item &&
    html`<div class="buttons controls">
      <button class="primary" onClick=${() => work.submit()} aria-disabled=${!complete(item.kind, work.draft)}>Submit <kbd aria-hidden="true">Enter</kbd></button>
      <button onClick=${() => work.undo()} disabled=${!work.undone.length}>Undo <kbd aria-hidden="true">u</kbd></button>
      <button onClick=${() => work.show("skip")} aria-expanded=${work.panel === "skip"}>Skip <kbd aria-hidden="true">x</kbd></button>
      <button onClick=${() => work.show("help")} aria-expanded=${work.panel === "help"}>Keys <kbd aria-hidden="true">?</kbd></button>
    </div>`;
  return html`<div class="work" onPointerDown=${() => (work.active = performance.now())}>
    <div class="worktop"><h1><${Short} text=${work.project.name} /></h1><${Progress} work=${work} /></div>
    ${work.project.guideline_text && html`<details class="guideline"><summary>Guideline, version ${work.project.guideline}</summary><${Text} text=${work.project.guideline_text} /></details>`}
    <p class="notice" role="status">${work.notice || work.error}</p>
    ${work.panel === "help" && html`<${Help} work=${work} kind=${kind} />`}
    ${work.panel === "skip" && html`<${Skip} work=${work} />`}
    ${!item && html`<div class="card empty">${work.project.decided ? "This round has been decided: there is nothing left to check. Thank you." : work.loading || work.error ? "Loading \u2026" : "There is nothing left for you here. Thank you."}
      ${work.undone.length > 0 && html` <button class="link" onClick=${() => work.undo()}>Take the last answer back</button>`}</div>`}
    ${item &&
    kind !== "pair" &&
    html`<div class="rate" key=${item.id} data-item=${item.id}>
      <div class="card talk"><${Conversation} messages=${item.messages} more=${more} />
        <div class="turn judged"><div class="who">Assistant, to be ${kind === "rate" ? "rated" : "checked"}</div>
          <${Text} text=${item.answers[0].text} length=${item.answers[0].length} more=${(from) => more(item.messages.length, from)} /></div></div>
      <div class="card panel">${kind === "rate" ? html`<${RatePanel} draft=${work.draft} cursor=${work.cursor} onValue=${set} keys=${work.keysOn} />` : html`<${CheckPanel} draft=${work.draft} onValue=${set} keys=${work.keysOn} />`}<${Reason} draft=${work.draft} onValue=${set} />${controls}</div>
    </div>`}
    ${item &&
    kind === "pair" &&
    html`<div class="compare" key=${item.id} data-item=${item.id}>
      <div class="card talk"><${Conversation} messages=${item.messages} more=${more} /></div>
      <div class="sides">${["Left", "Right"].map(
        (side, i) => html`<div class="card side"><h2>${side}</h2><${Text} text=${item.answers[i].text} length=${item.answers[i].length} more=${(from) => more(item.messages.length + i, from)} /></div>`,
      )}</div>
      <div class="card panel"><${ComparePanel} draft=${work.draft} onValue=${set} keys=${work.keysOn} /><${Reason} draft=${work.draft} onValue=${set} />${controls}</div>
    </div>`}
  </div>`;
}
