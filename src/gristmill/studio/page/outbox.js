// Answers on their way: kept in localStorage, one key each, until the server has acknowledged them. Sending one again is harmless,
// because its id was made here.

import { api } from "./api.js";

const RETRY = [500, 1000, 2000, 5000, 10000];
const BATCH = 20;

export class Outbox {
  constructor(person, { changed, accepted, ended }) {
    this.prefix = `studio:out:${person}:`;
    this.tell = { changed, accepted, ended };
    this.entries = [];
    this.aside = []; // what the server refused: shown, and kept until the person decides
    this.failures = 0;
    this.sending = false;
    this.count = 0;
    for (const key of Object.keys(localStorage)) {
      if (!key.startsWith(this.prefix)) continue;
      try {
        const entry = JSON.parse(localStorage.getItem(key));
        (entry.refused ? this.aside : this.entries).push(entry);
      } catch {
        localStorage.removeItem(key);
      }
    }
    this.entries.sort((a, b) => a.order - b.order);
    this.onOnline = () => this.send();
    addEventListener("online", this.onOnline);
    this.send();
  }

  close() {
    clearTimeout(this.timer);
    removeEventListener("online", this.onOnline);
    this.closed = true;
  }

  get waiting() {
    return this.entries.length;
  }

  get state() {
    if (this.entries.length === 0) return "saved";
    return this.failures ? "offline" : "saving";
  }

  add(type, body) {
    const entry = { id: body.id, type, body, order: Date.now() + this.count++ / 1000 };
    if (!entry.id) entry.id = `${type}-${entry.order}`;
    this.entries.push(entry);
    this.keep(entry);
    this.tell.changed();
    this.send();
  }

  keep(entry) {
    try {
      localStorage.setItem(this.prefix + entry.id, JSON.stringify(entry));
    } catch {
      // full or forbidden: the entry is still in this page, which asks before it closes
    }
  }

  forget(entry) {
    localStorage.removeItem(this.prefix + entry.id);
    this.entries = this.entries.filter((one) => one !== entry);
    this.aside = this.aside.filter((one) => one !== entry);
  }

  async send() {
    clearTimeout(this.timer);
    if (this.sending || this.closed || !this.entries.length) return;
    this.sending = true;
    try {
      while (this.entries.length && !this.closed) await this.sendSome();
      this.failures = 0;
    } catch (error) {
      if (error.status === 401) this.tell.ended();
      else this.timer = setTimeout(() => this.send(), RETRY[Math.min(this.failures, RETRY.length - 1)]);
      this.failures++;
    } finally {
      this.sending = false;
      if (!this.closed) this.tell.changed();
    }
  }

  async sendSome() {
    const [first] = this.entries;
    if (first.type === "flag") {
      try {
        await api("POST", "/flags", first.body);
        this.failures = 0;
      } catch (error) {
        if (![400, 404, 409].includes(error.status)) throw error;
      }
      this.forget(first);
      this.tell.accepted(first);
      return;
    }
    const next = this.entries.findIndex((entry) => entry.type === "flag");
    const batch = this.entries.slice(0, Math.min(BATCH, next < 0 ? BATCH : next));
    let said;
    try {
      said = await api("POST", "/answers", { answers: batch.map((entry) => entry.body) });
    } catch (error) {
      if (!error.said || !error.said.results) throw error;
      said = error.said;
    }
    this.failures = 0;
    batch.forEach((entry, i) => {
      const result = said.results[i];
      if (result.status === 200) {
        this.forget(entry);
        this.tell.accepted(entry);
      } else {
        this.entries = this.entries.filter((one) => one !== entry);
        entry.refused = result;
        this.aside.push(entry);
        this.keep(entry);
      }
    });
    this.tell.changed();
  }
}
