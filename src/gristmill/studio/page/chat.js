// Chat with any model of the run, and what is worth it made a row to train on.

import { html, useEffect, useRef, useState } from "./vendor/preact-htm.js";
import { api, uuid } from "./api.js";
import { Talk, Tokens, Turns } from "./talk.js";

export function Models({ models, value, onChange, label = "Model" }) {
  return html`<label>${label} <select value=${value} onChange=${(e) => onChange(e.target.value)}>${models.map((m) => html`<option value=${m.name}>${m.name}</option>`)}</select></label>`;
}

export function useModels() {
  const [models, setModels] = useState(null);
  const [error, setError] = useState("");
  useEffect(() => {
    api("GET", "/models").then(
      (said) => setModels(said.models),
      (e) => setError(e.message),
    );
  }, []);
  return { models, error };
}

export function useTalk() {
  const [, paint] = useState(0);
  const talk = useRef(null);
  if (!talk.current) talk.current = new Talk(() => paint((n) => n + 1));
  useEffect(() => () => talk.current.stop(), []);
  return talk.current;
}

export function Chat() {
  const { models, error } = useModels();
  const talk = useTalk();
  const [draft, setDraft] = useState({ text: "", system: "", temperature: 0, top_p: 1, seed: 0, max_tokens: 256, thinking: "" });
  const [model, setModel] = useState("");
  const [saved, setSaved] = useState("");
  const [edit, setEdit] = useState(null);
  useEffect(() => {
    document.title = "Chat - Studio";
  }, []);
  if (!models) return html`<h1>Chat</h1><p class=${error ? "bad" : "soft"}>${error || "Loading \u2026"}</p>`;
  if (!models.length) return html`<h1>Chat</h1><p class="soft">This folder has no model yet: open a run, and its models can be talked to as they are made.</p>`;
  const chosen = models.find((m) => m.name === model) || models[0];
  const set = (name) => (e) => setDraft({ ...draft, [name]: e.target.type === "number" ? Number(e.target.value) : e.target.value });
  const options = (seed) => {
    const { text, thinking, ...rest } = draft;
    return { ...rest, seed, model: chosen.name, ...(chosen.thinks && thinking ? { thinking: thinking === "on" } : {}) };
  };
  const send = (event) => {
    event.preventDefault();
    if (talk.busy || !draft.text.trim()) return;
    setSaved("");
    setEdit(null);
    talk.turns = [...talk.turns, { role: "user", content: draft.text }];
    setDraft({ ...draft, text: "" });
    talk.ask(options(draft.seed));
  };
  const again = () => {
    talk.turns = talk.turns.slice(0, -1);
    setSaved("");
    const seed = draft.seed + 1;
    setDraft({ ...draft, seed });
    talk.ask(options(seed));
  };
  const keep = async () => {
    const turns = talk.turns.map(({ role, content }) => ({ role, content }));
    if (draft.system) turns.unshift({ role: "system", content: draft.system });
    const edited = edit !== null && edit !== turns[turns.length - 1].content;
    if (edited) turns[turns.length - 1].content = edit;
    try {
      await api("POST", "/made", { id: uuid(), messages: turns, task: "chat", model: chosen.name, seed: draft.seed, edited });
      setSaved("Kept as a row: exports and the next round have it.");
      setEdit(null);
    } catch (e) {
      setSaved(e.message);
    }
  };
  const onKey = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
  };
  return html`<div class="chat">
    <h1>Chat</h1>
    <div class="bar">
      <${Models} models=${models} value=${chosen.name} onChange=${setModel} />
      <label>Temperature <input type="number" min="0" max="2" step="0.1" value=${draft.temperature} onInput=${set("temperature")} /></label>
      <label>top p <input type="number" min="0" max="1" step="0.05" value=${draft.top_p} onInput=${set("top_p")} /></label>
      <label>Seed <input type="number" min="0" step="1" value=${draft.seed} onInput=${set("seed")} /></label>
      <label>Longest answer <input type="number" min="1" max="4096" value=${draft.max_tokens} onInput=${set("max_tokens")} /></label>
      ${chosen.thinks && html`<label>Reasoning <select value=${draft.thinking} onChange=${set("thinking")}><option value="">as the model likes</option><option value="on">detailed thinking on</option><option value="off">detailed thinking off</option></select></label>`}
      <label class="grow">System prompt <input type="text" value=${draft.system} onInput=${set("system")} /></label>
    </div>
    <div class="card talk"><${Turns} talk=${talk} name=${chosen.name} /><${Tokens} tokens=${talk.busy ? [] : talk.tokens} /></div>
    <form class="card" onSubmit=${send}>
      <label>Message (Enter sends, Shift+Enter is a new line)<textarea rows="3" value=${draft.text} onInput=${set("text")} onKeyDown=${onKey}></textarea></label>
      <div class="buttons">
        ${talk.busy ? html`<button type="button" class="primary" onClick=${() => talk.stop()}>Stop</button>` : html`<button type="submit" class="primary" disabled=${!draft.text.trim()}>Send</button>`}
        <button type="button" disabled=${!talk.answered} onClick=${again}>Regenerate</button>
        <button type="button" disabled=${!talk.turns.length} onClick=${() => (talk.clear(), setSaved(""), setEdit(null))}>New</button>
        <button type="button" disabled=${!talk.answered} onClick=${() => setEdit(talk.turns[talk.turns.length - 1].content)}>Make this a row</button>
        <span class="soft" role="status">${saved}</span>
      </div>
    </form>
    ${edit !== null &&
    html`<section class="card" aria-label="Make this a row"><label>The last answer, as it should be<textarea rows="5" value=${edit} onInput=${(e) => setEdit(e.target.value)}></textarea></label>
      <div class="buttons"><button class="primary" onClick=${keep} disabled=${!edit.trim()}>Keep the row</button><button onClick=${() => setEdit(null)}>Leave it</button></div></section>`}
  </div>`;
}
