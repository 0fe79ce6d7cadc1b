// Red team: a conversation with the model under attack, transformations of what is asked, and how it went by the person first.

import { html, useEffect, useState } from "./vendor/preact-htm.js";
import { api, uuid } from "./api.js";
import { Models, useModels, useTalk } from "./chat.js";
import { Turns } from "./talk.js";
import { Short, When } from "./text.js";

const SEEN = "studio:redteam";
const HOLES = ["partial", "complied"];

function Before({ onGo }) {
  return html`<section class="card"><h2>Before you begin</h2>
    <p>Here models are attacked, so that what they should not say is found before others find it. You may read things that are violent, hateful or sexual. You may stop at any time: Escape hides all answers.</p>
    <p>Nothing is written here by itself: what is asked comes from you.</p>
    <div class="buttons"><button class="primary" onClick=${onGo}>I understand</button><a class="button" href="#/">Back</a></div></section>`;
}

function Found({ found, hidden }) {
  return html`<section><h2>Attacks so far</h2>
    <p class="soft">${found.outcomes.map((o) => `${found.counts[o]} ${o}`).join(", ")}; ${found.regressions} holes, which <code>regressions.jsonl</code> of the export asks again after every round (<code>safety: {rows: [regressions.jsonl]}</code> in the recipe).</p>
    <ul class="plain attacks">${found.attacks.map(
      (a) => html`<li class="card" key=${a.id}><p><span class=${`chip ${HOLES.includes(a.outcome) ? "hole" : ""}`}>${a.outcome}</span> <span class="chip">${a.model}</span> ${a.category && html`<span class="chip">${a.category}</span> `}${a.transforms && html`<code><${Short} text=${a.transforms} /></code> `}<span class="soft">${a.by}, <${When} at=${a.at} /></span></p>
        ${!hidden && html`<p><${Short} text=${a.turns[a.turns.length - 2].content.slice(0, 300)} /></p><p class="soft"><${Short} text=${a.turns[a.turns.length - 1].content.slice(0, 300)} /></p>`}</li>`,
    )}</ul></section>`;
}

export function RedTeam() {
  const [begun, setBegun] = useState(sessionStorage.getItem(SEEN) === "yes");
  const { models, error } = useModels();
  const talk = useTalk();
  const [found, setFound] = useState(null);
  const [draft, setDraft] = useState({ text: "", category: "", chain: [], seed: 0 });
  const [shown, setShown] = useState("");
  const [model, setModel] = useState("");
  const [said, setSaid] = useState("");
  const [view, setView] = useState(null);
  const [parent, setParent] = useState("");
  const [hidden, setHidden] = useState(false);
  const load = () => api("GET", "/attacks").then(setFound, (e) => setSaid(e.message));
  useEffect(() => {
    document.title = "Red team - Studio";
    load();
    const onKey = (event) => event.key === "Escape" && setHidden((is) => !is);
    document.addEventListener("keydown", onKey);
    return () => document.removeEventListener("keydown", onKey);
  }, []);
  const spec = draft.chain.join("+");
  useEffect(() => {
    let gone = false;
    if (!spec || !draft.text) return setShown(draft.text);
    api("POST", "/attacks/transform", { text: draft.text, spec, seed: draft.seed }).then(
      (reply) => gone || (setShown(reply.text), setSaid("")),
      (e) => gone || setSaid(e.message),
    );
    return () => (gone = true);
  }, [draft.text, spec, draft.seed]);
  if (!begun) return html`<h1>Red team</h1><${Before} onGo=${() => (sessionStorage.setItem(SEEN, "yes"), setBegun(true))} />`;
  if (!models || !found) return html`<h1>Red team</h1><p class=${error || said ? "bad" : "soft"}>${error || said || "Loading \u2026"}</p>`;
  if (!models.length) return html`<h1>Red team</h1><p class="soft">This folder has no model to attack: open a run.</p>`;
  const chosen = models.find((m) => m.name === model) || models[0];
  const set = (name) => (e) => setDraft({ ...draft, [name]: e.target.value });
  const send = (event) => {
    event.preventDefault();
    if (talk.busy || !shown.trim()) return;
    setView(null);
    talk.turns = [...talk.turns, { role: "user", content: shown }];
    setDraft({ ...draft, text: "" });
    talk.ask({ model: chosen.name, temperature: 0, seed: draft.seed, max_tokens: 512 });
  };
  const end = async (outcome) => {
    const id = uuid();
    try {
      const turns = talk.turns.map(({ role, content }) => ({ role, content }));
      const reply = await api("POST", "/attacks", { id, parent, category: draft.category, transforms: spec, conversation: turns, model: chosen.name, seed: draft.seed, outcome, codes: draft.category ? [draft.category] : [] });
      setParent(id);
      setView({ outcome, ...reply });
      setSaid("Kept. Go on with the conversation, or begin a new one.");
      load();
    } catch (e) {
      setSaid(e.message);
    }
  };
  const add = (e) => e.target.value && setDraft({ ...draft, chain: [...draft.chain, e.target.value].slice(0, 4) });
  return html`<div class="redteam">
    <h1>Red team</h1>
    ${hidden && html`<p class="banner">Answers are hidden. <button onClick=${() => setHidden(false)}>Show them <kbd aria-hidden="true">Esc</kbd></button></p>`}
    <div class="rate">
      <div>
        <div class="card talk">${hidden ? html`<p class="soft">hidden</p>` : html`<${Turns} talk=${talk} name=${chosen.name} />`}${!talk.turns.length && html`<p class="soft">Ask something that the model should not answer.</p>`}</div>
        <form class="card" onSubmit=${send}>
          <label>What you ask<textarea rows="3" value=${draft.text} onInput=${set("text")}></textarea></label>
          ${spec && shown.trim() && html`<p class="who">As the model gets it</p><p class="transformed"><${Short} text=${shown.slice(0, 1000)} /></p>`}
          <div class="buttons">${talk.busy ? html`<button type="button" class="primary" onClick=${() => talk.stop()}>Stop</button>` : html`<button class="primary" type="submit" disabled=${!shown.trim()}>Attack</button>`}
            <button type="button" onClick=${() => (talk.clear(), setView(null), setParent(""), setSaid(""))}>New conversation</button></div>
        </form>
      </div>
      <div class="card panel">
        <${Models} models=${models} value=${chosen.name} onChange=${setModel} label="Model under attack" />
        <label class="stacked">Category <select value=${draft.category} onChange=${set("category")}><option value="">none</option>${found.categories.map((c) => html`<option value=${c.code}>${c.code} ${c.name}</option>`)}</select></label>
        <label class="stacked">Add a transformation <select value="" onChange=${add}><option value="">choose \u2026</option>${found.transforms.map((t) => html`<option value=${t}>${t.replaceAll("_", " ")}</option>`)}</select></label>
        ${draft.chain.length > 0 && html`<p>${draft.chain.map((t, i) => html`<button class="link" onClick=${() => setDraft({ ...draft, chain: draft.chain.filter((_, j) => j !== i) })}>${t.replaceAll("_", " ")} <span aria-hidden="true">\u00d7</span><span class="away"> take out</span></button> `)}</p>`}
        <h2>How did it go?</h2>
        <div class="buttons">${found.outcomes.map((o) => html`<button disabled=${!talk.answered} onClick=${() => end(o)}>${o}</button>`)}</div>
        <p class="soft after" role="status">${said}</p>
        ${view &&
        html`<dl class="facts"><div><dt>you</dt><dd>${view.outcome}</dd></div><div><dt>its beginning reads as</dt><dd>${view.refusal === "full" ? "refusal" : view.refusal}</dd></div>
          ${view.guard && html`<div><dt>guard</dt><dd>${view.guard.unsafe === null ? view.guard.says : view.guard.unsafe ? `unsafe ${view.guard.codes.join(" ")}` : "safe"}</dd></div>`}</dl>`}
      </div>
    </div>
    <${Found} found=${found} hidden=${hidden} />
  </div>`;
}
