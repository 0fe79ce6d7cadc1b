// The page: who is here, which screen is shown, and the state of what is on its way to the server.

import { html, render, useState } from "./vendor/preact-htm.js";
import { api, uuid } from "./api.js";
import { forget, query, route } from "./early.js";
import { Outbox } from "./outbox.js";
import { Work, WorkView } from "./work.js";
import { Home, People } from "./home.js";
import { Rows } from "./rows.js";
import { Agreement, Settle } from "./agreement.js";
import { Run } from "./run.js";
import { Chat } from "./chat.js";
import { RedTeam } from "./redteam.js";
import { Short } from "./text.js";

const state = { me: null, ready: false, projects: null, work: null, outbox: null, stamp: 0, error: "", invite: "" };
const root = document.getElementById("app");
let due = false;

function paint() {
  if (due) return;
  due = true;
  queueMicrotask(() => {
    due = false;
    render(html`<${App} />`, root);
  });
}

export function go(path, params = {}) {
  const search = query(params);
  location.hash = `#/${path}${search ? "?" + search : ""}`;
}

async function loadProjects() {
  try {
    state.projects = (await api("GET", "/projects")).projects;
    if (state.work) {
      const mine = state.projects.find((project) => project.id === state.work.project.id);
      if (mine) state.work.project = mine;
    }
  } catch (error) {
    if (error.status === 401) return ended();
  }
  follow();
  paint();
}

function ended() {
  if (state.work) state.work.close();
  if (state.outbox) state.outbox.close();
  if (state.events) state.events.close();
  Object.assign(state, { me: null, work: null, outbox: null, events: null, projects: null });
  paint();
}

function enter(me) {
  Object.assign(state, { me, error: "", invite: "" });
  state.outbox = new Outbox(me.id, { changed: paint, accepted: () => state.work && !state.work.items.length && state.work.fill(), ended });
  state.events = new EventSource("/studio/api/events");
  let timer = 0;
  state.events.onmessage = () => {
    if (timer) return; // ten people at work: not a request an answer
    timer = setTimeout(() => {
      timer = 0;
      state.stamp++;
      loadProjects();
      if (state.work && !state.work.items.length) state.work.fill();
    }, 1000);
  };
  if (location.hash.startsWith("#token=") || location.hash.startsWith("#invite=")) history.replaceState(null, "", "/#/");
  loadProjects();
}

// The work of a project begins and ends with its screen.
function follow() {
  const { screen, id } = route();
  const project = screen === "work" && (state.projects || []).find((one) => one.id === id);
  if (state.work && (!project || state.work.project.id !== id)) {
    state.work.close();
    state.work = null;
  }
  if (project && !state.work && state.me.role !== "reader") state.work = new Work(state.me, project, state.outbox, paint);
}

async function logIn(body) {
  forget();
  try {
    enter(await api("POST", "/session", body));
  } catch (error) {
    state.error = error.message;
  }
  state.ready = true;
  paint();
}

function Login() {
  const [name, setName] = useState("");
  const [password, setPassword] = useState("");
  const submit = (event) => {
    event.preventDefault();
    logIn(state.invite ? { token: state.invite, name, password } : { name, password });
  };
  return html`<main class="login" id="main"><form class="card" onSubmit=${submit}>
    <h1>${state.invite ? "Welcome" : "Log in"}</h1>
    <p class="soft">${state.invite ? "You were invited. Choose a name and a password of ten characters or more; exports know you by a number alone." : "With the name and password that you chose, or by the link that the owner's program prints."}</p>
    <label>Name <input type="text" autocomplete="username" required maxlength="80" value=${name} onInput=${(e) => setName(e.target.value)} /></label>
    <label>Password <input type="password" autocomplete=${state.invite ? "new-password" : "current-password"} required maxlength="200" value=${password} onInput=${(e) => setPassword(e.target.value)} /></label>
    <p class="bad" role="alert">${state.error}</p>
    <button class="primary" type="submit">${state.invite ? "Come in" : "Log in"}</button>
  </form></main>`;
}

function Saved() {
  const { outbox } = state;
  const words = { saved: "saved", saving: `saving ${outbox.waiting}`, offline: `offline, ${outbox.waiting} waiting` }[outbox.state];
  return html`<span class="saved ${outbox.state}" role="status" aria-live="polite" data-state=${outbox.state}><span aria-hidden="true" class="dot"></span>${words}</span>`;
}

// What the server refused: shown until the person has decided.
function Aside() {
  const { outbox } = state;
  const keep = (entry) => {
    outbox.forget(entry);
    outbox.add("answer", { ...entry.body, id: uuid(), version: entry.refused.newest.version + 1 });
    paint();
  };
  const drop = (entry) => {
    outbox.forget(entry);
    paint();
  };
  return outbox.aside.map(
    (entry) => html`<div class="banner" role="alert" key=${entry.id}>
      <span>${entry.refused.newest ? "You answered an item twice, here and in another tab." : `${entry.type === "flag" ? "A skip" : "An answer"} was not taken: ${entry.refused.error}`}</span>
      ${entry.refused.newest && html`<button onClick=${() => keep(entry)}>Keep this one</button>`}
      <button onClick=${() => drop(entry)}>${entry.refused.newest ? "Keep the other" : "Forget it"}</button>
    </div>`,
  );
}

function Screen() {
  const { screen, id, params } = route();
  const { me, projects } = state;
  const looks = me.role !== "annotator";
  const decides = me.role === "owner" || me.role === "expert";
  const project = (projects || []).find((one) => one.id === id);
  if (screen === "rows" && looks) return html`<${Rows} params=${params} go=${go} />`;
  if (screen === "run" && looks && me.is_run) return html`<${Run} me=${me} params=${params} go=${go} />`;
  if (screen === "chat" && decides) return html`<${Chat} />`;
  if (screen === "redteam" && decides) return html`<${RedTeam} />`;
  if (screen === "people" && me.role === "owner") return html`<${People} />`;
  if (screen === "settle" && decides) return html`<${Settle} key=${id} item=${id} done=${() => history.back()} />`;
  if (["work", "agreement"].includes(screen) && !projects) return html`<p class="soft">Loading \u2026</p>`;
  if (screen === "work" && state.work) return html`<${WorkView} work=${state.work} />`;
  if (screen === "agreement" && project && looks)
    return html`<${Agreement} key=${id} project=${project} params=${params} go=${go} stamp=${state.stamp} canSettle=${me.role !== "reader"} />`;
  return html`<${Home} me=${me} projects=${projects} changed=${loadProjects} />`;
}

function App() {
  if (!state.ready) return html`<main class="login" id="main"><p class="soft">Loading \u2026</p></main>`;
  if (!state.me) return html`<${Login} />`;
  const { screen } = route();
  const { me } = state;
  const link = (name, label) => html`<a href=${name === "home" ? "#/" : `#/${name}`} aria-current=${screen === name ? "page" : undefined}>${label}</a>`;
  return html`<div>
    <a class="to-main" href="#main" onClick=${(e) => (e.preventDefault(), document.getElementById("main").focus())}>To the content</a>
    <header><span class="brand">gristmill <b>studio</b></span>
      <nav aria-label="Screens">${link("home", "Projects")}${me.role !== "annotator" && link("rows", "Rows")}${me.role !== "annotator" && me.is_run && link("run", "Run")}${["owner", "expert"].includes(me.role) && me.is_run && html`${link("chat", "Chat")}${link("redteam", "Red team")}`}${me.role === "owner" && link("people", "People")}</nav>
      <${Saved} />
      <span class="me"><${Short} text=${me.name} />${me.role !== me.name && html` <span class="soft">${me.role}</span>`}</span>
      <button onClick=${() => api("DELETE", "/session", {}).then(ended, ended)}>Log out</button>
    </header>
    <main id="main" tabindex="-1"><${Aside} /><${Screen} /></main>
  </div>`;
}

addEventListener("hashchange", () => {
  if (state.me) follow();
  paint();
});
addEventListener("beforeunload", (event) => {
  if (state.outbox && state.outbox.waiting) event.preventDefault();
});

const token = /^#(token|invite)=([\w-]+)/.exec(location.hash);
if (token && token[1] === "token") {
  api("GET", "/me").then((me) => (me.role ? ((state.ready = true), enter(me), paint()) : logIn({ token: token[2] })), () => logIn({ token: token[2] }));
} else {
  if (token) state.invite = token[2];
  api("GET", "/me").then(
    (me) => {
      state.ready = true;
      if (me.role && !state.invite) enter(me);
      paint();
    },
    (error) => {
      Object.assign(state, { ready: true, error: error.message });
      paint();
    },
  );
}
paint();
