// Agreement: how far people say the same, each person beside the others, and the items to settle.

import { html, useEffect, useState } from "./vendor/preact-htm.js";
import { api, uuid } from "./api.js";
import { query } from "./early.js";
import { Conversation, Short, Text } from "./text.js";
import { ATTRIBUTES, ComparePanel, RatePanel, Reason, complete, content } from "./panels.js";

const num = (x, digits = 2) => (x === null || x === undefined ? "\u2013" : x.toFixed(digits).replace(/^-(?=[0.]*$)/, "").replace("-", "\u2212").replace(/^(\u2212?)0\./, "$1."));
const ORDER = { rate: `Marks are of ${ATTRIBUTES.join(", ")}.`, pair: "From -3, left is much better, to +3, right is." };
const says = (kind, c) => (kind === "rate" ? ATTRIBUTES.map((n) => c[n]).join(" ") : c.neither ? "neither" : c.preference > 0 ? `+${c.preference}` : String(c.preference));

function Confusion({ attribute }) {
  const most = Math.max(1, ...attribute.confusion.flat());
  const low = attribute.name === "preference" ? -3 : 0;
  return html`<figure class="confusion"><figcaption>${attribute.name}</figcaption><table>
    <thead><tr><td></td>${attribute.confusion.map((_, i) => html`<th scope="col">${i + low}</th>`)}</tr></thead>
    <tbody>${attribute.confusion.map(
      (row, i) => html`<tr><th scope="row">${i + low}</th>${row.map((n) => html`<td class=${`num heat-${Math.ceil((n / most) * 5)}`}>${n || ""}</td>`)}</tr>`,
    )}</tbody></table></figure>`;
}

export function Agreement({ project, params, go, stamp, canSettle }) {
  const [found, setFound] = useState(null);
  const [error, setError] = useState("");
  useEffect(() => {
    document.title = `Agreement on ${project.name} - Studio`;
    let gone = false;
    api("GET", `/statistics/${project.id}?` + query({ guideline: params.guideline })).then(
      (said) => gone || (setFound(said), setError("")),
      (e) => gone || setError(e.message),
    );
    return () => (gone = true);
  }, [project.id, params.guideline, stamp]);
  if (error) return html`<h1>Agreement</h1><p class="bad">${error}</p>`;
  if (!found) return html`<h1>Agreement</h1><p class="soft">Computing \u2026</p>`;
  const versions = [...Array(found.guidelines).keys()].map((i) => i + 1).reverse();
  return html`<div class="agreement">
    <h1>Agreement on <${Short} text=${project.name} /></h1>
    <p>${found.answers.toLocaleString("en")} answers to ${found.items.toLocaleString("en")} items, ${found.shared.toLocaleString("en")} of which two people or more have answered.
      ${found.others > 0 && ` ${found.others} answers by other versions of the guideline are left out.`}
      ${Object.keys(found.flags).length > 0 && html` Skipped: ${Object.entries(found.flags).map(([kind, n]) => `${n} ${kind}`).join(", ")}.`}</p>
    ${found.guidelines > 1 &&
    html`<label>Guideline <select value=${String(params.guideline ?? found.guideline)} onChange=${(e) => go(`agreement/${project.id}`, { guideline: e.target.value })}>
      ${versions.map((v) => html`<option value=${String(v)}>version ${v}</option>`)}<option value="0">all versions together</option>
    </select></label>`}
    ${found.says && html`<p class="notice">${found.says}</p>`}
    ${found.shared > 0 &&
    html`<div class="wide"><table><caption>Attributes</caption><thead><tr><th scope="col">attribute</th><th scope="col" class="num">alpha (ordinal)</th><th scope="col" class="num">95 % interval</th><th scope="col" class="num">kappa (quadratic)</th>${found.kind === "rate" && html`<th scope="col" class="num">HelpSteer2's kappa</th>`}<th scope="col" class="num">items</th></tr></thead>
      <tbody>${found.attributes.map(
        (a) => html`<tr><th scope="row">${a.name}</th><td class="num">${num(a.alpha)}</td><td class="num">${a.low === null ? "\u2013" : `[${num(a.low)}, ${num(a.high)}]`}</td><td class="num">${num(a.kappa)}</td>${found.kind === "rate" && html`<td class="num soft">${num(a.published, 3)}</td>`}<td class="num">${a.items}</td></tr>`,
      )}</tbody></table></div>
    <p class="soft">\u2013 where it is not defined: no two answers to one item, or all answers the same.</p>`}
    ${found.people.length > 0 &&
    html`<div class="wide"><table><caption>Each person against the others</caption><thead><tr><th scope="col">person</th><th scope="col" class="num">answers</th><th scope="col" class="num">seconds, median</th>${found.attributes.map((a) => html`<th scope="col" class="num">${a.name}: kappa, bias</th>`)}${found.kind === "rate" && html`<th scope="col" class="num">same mark for all</th>`}</tr></thead>
      <tbody>${found.people.map(
        (p) => html`<tr><th scope="row">${p.name}</th><td class="num">${p.answers}</td><td class="num">${num(p.seconds, 1)}</td>${found.attributes.map((a) => html`<td class="num">${num(p.kappa[a.name])}, ${num(p.bias[a.name])}</td>`)}${found.kind === "rate" && html`<td class="num">${p.straight === null ? "\u2013" : `${Math.round(p.straight * 100)} %`}</td>`}</tr>`,
      )}</tbody></table></div>`}
    ${found.disputed.length > 0 &&
    html`<h2>Most disputed</h2><p class="soft">${ORDER[found.kind]}</p><ul class="disputed">${found.disputed.map(
      (d) => html`<li class="card"><div><p><${Short} text=${d.excerpt || "(no text)"} /></p>
        <p class="soft">${d.task && html`<span class="chip"><${Short} text=${d.task} /></span> `}${d.answers.map((a) => html`<span class="fact">${a.person}: ${says(found.kind, a.content)}</span> `)}</p></div>
        ${canSettle && html`<a class="button" href=${`#/settle/${d.item}`}>Settle<span class="away"> this item</span></a>`}</li>`,
    )}</ul>`}
    ${found.shared > 0 && html`<h2>Confusion</h2><p class="soft">How often two people gave these two values to one item.</p><div class="confusions">${found.attributes.map((a) => html`<${Confusion} attribute=${a} />`)}</div>`}
  </div>`;
}

export function Settle({ item, done }) {
  const [found, setFound] = useState(null);
  const [draft, setDraft] = useState({});
  const [error, setError] = useState("");
  useEffect(() => {
    document.title = `Settle ${item.slice(0, 6)} - Studio`;
    api("GET", `/items/${item}`).then(setFound, (e) => setError(e.message));
  }, [item]);
  if (!found) return html`<h1>Settle</h1><p class=${error ? "bad" : "soft"}>${error || "Loading \u2026"}</p>`;
  const submit = async () => {
    if (!complete(found.kind, draft)) return setError("Give every value first.");
    const version = 1 + Math.max(0, ...found.history.filter((a) => a.role === "expert" && a.mine).map((a) => a.version));
    try {
      await api("POST", `/items/${item}/resolve`, { id: uuid(), version, content: content(found.kind, draft), seconds: 0, keys: 0 });
      done();
    } catch (e) {
      if (e.status === 409 && e.said.newest) {
        try {
          await api("POST", `/items/${item}/resolve`, { id: uuid(), version: e.said.newest.version + 1, content: content(found.kind, draft), seconds: 0, keys: 0 });
          return done();
        } catch (again) {
          return setError(again.message);
        }
      }
      setError(e.message);
    }
  };
  const more = (part, from) => `/items/${item}/text?` + query({ part, from, settle: 1 });
  const set = (name, value) => {
    const next = { ...draft, [name]: value };
    if (name === "preference") next.neither = false;
    if (name === "neither") delete next.preference;
    setDraft(next);
  };
  return html`<div class="work">
    <h1>Settle</h1>
    <p class="notice" role="status">${error}</p>
    <div class=${found.kind === "rate" ? "rate" : "compare"}>
      <div class="card talk"><${Conversation} messages=${found.messages} more=${more} />
        ${found.answers.map((a, i) => html`<div class="turn judged"><div class="who">${found.kind === "pair" ? ["Left", "Right"][i] : "Assistant"}</div><${Text} text=${a.text} length=${a.length} more=${(from) => more(found.messages.length + i, from)} /></div>`)}
        <h2>What people said</h2>
        ${found.history.length === 0 ? html`<p class="soft">Nobody has answered this item yet.</p>` : html`<p class="soft">${ORDER[found.kind]}</p>`}
        <ul class="plain">${found.history.map((a) => html`<li><span class="chip">${a.person}</span> ${says(found.kind, a.content)}${a.role === "expert" ? " (settled)" : ""}${a.late ? " (too late, not counted)" : ""} <${Short} text=${a.content.reason} /></li>`)}</ul>
      </div>
      <div class="card panel">
        ${found.kind === "rate" ? html`<${RatePanel} draft=${draft} cursor=${-1} onValue=${set} />` : html`<${ComparePanel} draft=${draft} onValue=${set} />`}
        <${Reason} draft=${draft} onValue=${set} />
        <div class="buttons"><button class="primary" onClick=${submit}>Settle</button><button onClick=${done}>Leave it</button></div>
      </div>
    </div>
  </div>`;
}
