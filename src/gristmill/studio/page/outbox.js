// Answers on their way: kept in localStorage, one key each, until the server has acknowledged them. Sending one again is harmless,
// because its id was made here.

import { api } from "./api.js";

const RETRY = [500, 1000, 2000, 5000, 10000];
const BATCH = 20;
const BATCH_BYTES = 500_000; // of a request, of which the server takes 1 MiB; a single answer has less
const NEVER = [400, 404, 409, 413]; // refusals that sending again does not change
const size = (body) => new TextEncoder().encode(JSON.stringify(body)).length;

export class Outbox {
  constructor(person, { changed, accepted, ended }) {
    this.prefix = `studio:out:${person}:`;
    this.tell = { changed, accepted, ended };
    this.entries = [];
    this.aside = []; // what the server refused: shown, and kept until the person decides
    this.failures = 0;
    this.most = BATCH_BYTES;
    this.sending = false;
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
    this.last = Math.max(0, ...this.entries.map((entry) => entry.order));
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
    this.last = Math.max(Date.now(), this.last + 0.001); // a clock may be set back meanwhile
    const entry = { id: body.id, type, body, order: this.last };
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
      await this.sendFlag(first);
      return;
    }
    const batch = this.batch();
    let said;
    try {
      said = await api("POST", "/answers", { answers: batch.map((entry) => entry.body) });
    } catch (error) {
      if (error.status === 413 && batch.length > 1) {
        this.most = 0; // something before the server takes less: one by one
        return;
      }
      if (error.status === 413) said = { results: [{ status: 413, error: error.message }] };
      else if (error.said && error.said.results) said = error.said;
      else throw error;
    }
    this.failures = 0;
    batch.forEach((entry, i) => this.settle(entry, said.results[i]));
    this.tell.changed();
  }

  // The answers that go in the next request: those before the next flag, as many as one may hold.
  batch() {
    const out = [];
    let bytes = 0;
    for (const entry of this.entries.slice(0, BATCH)) {
      bytes += size(entry.body);
      if (entry.type === "flag" || (out.length && bytes > this.most)) break;
      out.push(entry);
    }
    return out;
  }

  async sendFlag(entry) {
    let result = { status: 200 };
    try {
      await api("POST", "/flags", entry.body);
    } catch (error) {
      if (!NEVER.includes(error.status)) throw error;
      result = { status: error.status, error: error.message };
    }
    this.failures = 0;
    this.settle(entry, result);
    this.tell.changed();
  }

  // What the server said of an entry: it is done with, or put before the person.
  settle(entry, result) {
    if (result.status === 200) {
      this.forget(entry);
      this.tell.accepted(entry);
      return;
    }
    this.entries = this.entries.filter((one) => one !== entry);
    entry.refused = result;
    this.aside.push(entry);
    this.keep(entry);
  }
}
