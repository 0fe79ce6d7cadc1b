// The first screen: projects, a new one, exports; and the people who may come in.

import { html, useEffect, useRef, useState } from "./vendor/preact-htm.js";
import { api, lines } from "./api.js";
import { Short } from "./text.js";

const EXPORTS = ["rated.parquet", "ratings.jsonl", "pairs.parquet", "preference.jsonl", "demonstrations.parquet", "attacks.jsonl", "regressions.jsonl"];
const STRATEGIES = {
  random: "at random",
  disagreement: "where reward heads disagree",
  "d-optimal": "D-optimal for the reward model",
  conflict: "where verifier and reward conflict",
};
// Means of five seeds, and differences to random with 95 % intervals: docs/results.md says by which command.
const WORTH = [
  ["nothing more", 0, ".708", "+.002 [\u2212.007, +.011]"],
  ["at random", 180, ".706", ""],
  ["disagreement", 194, ".716", "+.009 [+.004, +.015]"],
  ["D-optimal", 189, ".723", "+.017 [\u2212.005, +.038]"],
];
const WHAT = { rate: "Rate answers on five attributes", pair: "Compare two answers", check: "Check what a round is about to train on" };
const count = (n) => n.toLocaleString("en");
const VERB = { rate: "Rate", pair: "Compare", check: "Check" };

function Project({ project, role, changed }) {
  const [text, setText] = useState(null);
  const [error, setError] = useState("");
  const works = role !== "reader";
  const looks = role !== "annotator";
  const save = async () => {
    try {
      await api("POST", `/projects/${project.id}/guideline`, { guideline: text });
      setText(null);
      changed();
    } catch (e) {
      setError(e.message);
    }
  };
  return html`<li class="card project">
    <h2><${Short} text=${project.name} /></h2>
    <p class="soft">${project.decided ? "Decided. " : ""}${WHAT[project.kind]}${looks ? html`, of <code><${Short} text=${project.source} /></code>; each needs ${project.need}${project.settings.strategy && project.settings.strategy !== "random" ? `; prompts chosen ${STRATEGIES[project.settings.strategy]}, one in five at random` : ""}` : ""}</p>
    <div class="progress"><progress max=${project.items} value=${project.closed} aria-label=${`Progress of ${project.name}`}></progress><span>${count(project.closed)} of ${count(project.items)} done${project.split ? `, ${count(project.split)} in dispute` : ""}</span>
      <span class="soft">${[looks && `${count(project.answers)} answers`, works && `${count(project.mine)} by you`].filter(Boolean).join(", ")}</span></div>
    <div class="buttons">
      ${works && !project.decided && html`<a class="button primary" href=${`#/work/${project.id}`}>${VERB[project.kind]}<span class="away"> in ${project.name}</span></a>`}
      ${looks && project.kind === "check" && html`<a class="button" href="#/run">${role === "reader" || project.decided ? "Look" : "Decide"}<span class="away"> about ${project.name}</span></a>`}
      ${looks && project.kind !== "check" && html`<a class="button" href=${`#/agreement/${project.id}`}>Agreement<span class="away"> on ${project.name}</span></a>`}
      ${role === "owner" && text === null && html`<button onClick=${() => setText(project.guideline_text)}>Guideline, version ${project.guideline}</button>`}
    </div>
    ${text !== null && html`<label class="reason">Guideline: answers name the version that they were given by<textarea rows="6" value=${text} onInput=${(e) => setText(e.target.value)}></textarea></label>
      <div class="buttons"><button class="primary" onClick=${save}>Save as version ${project.guideline + 1}</button><button onClick=${() => setText(null)}>Leave it</button></div><p class="bad">${error}</p>`}
  </li>`;
}

function NewProject({ changed, open }) {
  const [sources, setSources] = useState(null);
  const [draft, setDraft] = useState({ kind: "rate", num: 50, need: 1, guideline: "", name: "", strategy: "random" });
  const [error, setError] = useState("");
  const [busy, setBusy] = useState(null); // while it is made: how far that is
  const [made, setMade] = useState(false);
  const abort = useRef(null);
  useEffect(() => {
    api("GET", "/sources").then(setSources, (e) => setError(e.message));
    return () => abort.current && abort.current.abort(); // nobody waits for it any more
  }, []);
  const set = (name) => (e) => setDraft({ ...draft, [name]: e.target.type === "number" ? Number(e.target.value) : e.target.value });
  const names = sources ? sources.of_kind[draft.kind] : [];
  const source = names.includes(draft.source) ? draft.source : names.findLast((name) => name.endsWith("/responses.parquet")) || names[0] || "";
  const create = async (event) => {
    event.preventDefault();
    setBusy({});
    setMade(false);
    setError("");
    abort.current = new AbortController();
    let project = "";
    try {
      for await (const line of lines("/projects", { ...draft, source }, abort.current.signal)) {
        if (line.error) throw new Error(line.error);
        project = line.id;
        if (!project) setBusy(line);
      }
      if (!project) throw new Error("The server has ended, and nothing of it is kept.");
      setMade(true);
      setDraft({ ...draft, name: "" });
      changed();
    } catch (e) {
      setError(e.name === "AbortError" ? "It was stopped, and nothing of it is kept." : e.message);
    }
    setBusy(null);
  };
  return html`<details class="card" open=${open}><summary>New project</summary>
    <form class="grid" onSubmit=${create}>
      <label>People are asked to <select value=${draft.kind} onChange=${set("kind")}><option value="rate">rate answers on five attributes</option><option value="pair">compare two answers</option></select></label>
      <label>Rows of <select value=${source} onChange=${set("source")}>${names.map((name) => html`<option value=${name}>${name}</option>`)}</select></label>
      <label>Prompts chosen <select value=${draft.strategy} onChange=${set("strategy")}>${Object.entries(STRATEGIES).map(([name, words]) => html`<option value=${name}>${words}</option>`)}</select></label>
      <label>Prompts <input type="number" min="1" max="100000" required value=${draft.num} onInput=${set("num")} /></label>
      <label>People an item needs <input type="number" min="1" max="25" required value=${draft.need} onInput=${set("need")} /></label>
      <label>Name, which everybody sees <input type="text" maxlength="80" value=${draft.name} onInput=${set("name")} placeholder=${draft.kind === "rate" ? "Ratings" : "Comparisons"} /></label>
      <label class="full">Guideline <textarea rows="3" value=${draft.guideline} onInput=${set("guideline")}></textarea></label>
      <${Worth} />
      <div class="buttons full"><button class="primary" type="submit" disabled=${busy || !source}>${busy ? "Making it \u2026" : "Make the project"}</button>${busy && html`<${Making} far=${busy} stop=${() => abort.current.abort()} />`}${made && html`<span role="status">It is made: see above.</span>`}<span class="bad" role="status">${error || (sources && !names.length ? "There are no such rows here." : "")}</span></div>
    </form></details>`;
}

function Worth() {
  return html`<details class="full"><summary>Is choosing worth it?</summary>
    <p class="soft">Measured on the miniature, with simulated people in this studio: the reward model is trained anew on what was said, five times with other prompts, people and orders.</p>
    <div class="wide"><table><thead><tr><th scope="col">prompts chosen</th><th scope="col" class="num">answers</th><th scope="col" class="num">accuracy on held-out pairs</th><th scope="col" class="num">difference to random</th></tr></thead>
    <tbody>${WORTH.map(([name, answers, accuracy, difference]) => html`<tr><th scope="row">${name}</th><td class="num">${answers}</td><td class="num">${accuracy}</td><td class="num">${difference}</td></tr>`)}</tbody></table></div></details>`;
}

// How far the reward model is with the answers that are chosen from.
function Making({ far, stop }) {
  const { done, of, left } = far;
  return html`${of && html`<span class="progress"><progress max=${of} value=${done} aria-label="Answers that the reward model has read"></progress>
      <span>${done ? `${count(done)} of ${count(of)} answers read${left ? `, ${count(Math.ceil(left))} s left` : ""}` : `Loading the reward model for ${count(of)} answers`}</span></span>`}
    <button type="button" onClick=${stop}>Stop</button>`;
}

export function Home({ me, projects, changed }) {
  useEffect(() => {
    document.title = "Studio";
    const timer = me.is_run ? setInterval(changed, 10000) : 0; // a run may ask for a check
    return () => clearInterval(timer);
  }, []);
  return html`<div class="home">
    <h1>Projects</h1>
    ${!projects && html`<p class="soft">Loading \u2026</p>`}
    ${projects && !projects.length && html`<p class="soft">There is no project yet.${me.role === "owner" ? " Make one: a random sample of a run's answers, for you or for others." : " The owner of this studio makes one."}</p>`}
    <ul class="projects">${(projects || []).map((project) => html`<${Project} key=${project.id} project=${project} role=${me.role} changed=${changed} />`)}</ul>
    ${me.role === "owner" && projects && html`<${NewProject} changed=${changed} open=${!projects.length} />`}
    ${me.role === "owner" &&
    projects &&
    projects.length > 0 &&
    html`<section class="card"><h2>What people said, as files</h2><p class="soft">The first and the third are what <code>gristmill train reward</code> and <code>train rpo</code> read.</p>
      <div class="buttons">${EXPORTS.map((name) => html`<a class="button" href=${`/studio/api/export/${name}`} download>${name}</a>`)}</div></section>`}
  </div>`;
}

export function People() {
  const [people, setPeople] = useState(null);
  const [role, setRole] = useState("annotator");
  const [link, setLink] = useState("");
  const [error, setError] = useState("");
  const load = () => api("GET", "/people").then((said) => setPeople(said.people), (e) => setError(e.message));
  useEffect(() => {
    document.title = "People - Studio";
    load();
  }, []);
  const invite = async () => {
    try {
      const { token } = await api("POST", "/invitations", { role });
      setLink(`${location.origin}/#invite=${token}`);
    } catch (e) {
      setError(e.message);
    }
  };
  const remove = async (person) => {
    if (!confirm(`Remove ${person.name}? Their answers stay, under ${person.pseudonym}.`)) return;
    await api("DELETE", `/people/${person.id}`).catch((e) => setError(e.message));
    load();
  };
  return html`<div class="people"><h1>People</h1>
    <p class="bad" role="status">${error}</p>
    <div class="wide"><table><thead><tr><th scope="col">name</th><th scope="col">in exports</th><th scope="col">role</th><th scope="col" class="num">items answered</th><th scope="col"><span class="away">remove</span></th></tr></thead>
    <tbody>${(people || []).map((p) => html`<tr key=${p.id}><th scope="row"><${Short} text=${p.name} /></th><td>${p.pseudonym}</td><td>${p.role}</td><td class="num">${p.answers}</td><td>${p.role !== "owner" && html`<button onClick=${() => remove(p)}>Remove<span class="away"> ${p.name}</span></button>`}</td></tr>`)}</tbody></table></div>
    <section class="card"><h2>Invite</h2>
      <div class="bar"><label>As <select value=${role} onChange=${(e) => setRole(e.target.value)}><option value="annotator">annotator: own queue only</option><option value="expert">expert: settles, sees agreement and rows</option><option value="reader">reader: sees agreement and rows</option></select></label><button onClick=${invite}>Make a link</button></div>
      ${link && html`<p>Send this link to one person: it works once, for seven days.</p><p><code class="link-text">${link}</code></p>`}
      ${link && /127\.0\.0\.1|localhost/.test(location.hostname) && html`<p class="soft">This address is of this machine alone: start the studio with --host and --url for people elsewhere.</p>`}
    </section></div>`;
}
