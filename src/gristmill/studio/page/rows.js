// Rows of a run or folder: a list by pages with a filter, and a row with its answers side by side and its family tree.

import { html, useEffect, useLayoutEffect, useRef, useState } from "./vendor/preact-htm.js";
import { api } from "./api.js";
import { query, rowsAddress } from "./early.js";
import { Conversation, Short, Text, When } from "./text.js";

const SHORT_FACTS = ["task", "score", "verified", "judge", "generator", "origin", "temperature", "chosen_reward", "rejected_reward"];
const value = (one) => (typeof one === "number" ? String(Math.round(one * 1000) / 1000) : typeof one === "object" ? JSON.stringify(one) : String(one));

function Facts({ facts, names }) {
  const shown = (names || Object.keys(facts)).filter((name) => facts[name] !== undefined && name !== "rating" && name !== "labels");
  const marks = facts.rating || facts.labels;
  return html`<dl class="facts">
    ${shown.map((name) => html`<div><dt>${name.replace("_", " ")}</dt><dd><${Short} text=${value(facts[name])} /></dd></div>`)}
    ${marks && Object.entries(marks).map(([name, mark]) => html`<div><dt>${name}</dt><dd>${mark === null ? "\u2013" : value(mark)}</dd></div>`)}
  </dl>`;
}

function Tree({ id, open }) {
  const [found, setFound] = useState(null);
  const [error, setError] = useState("");
  useEffect(() => {
    let gone = false;
    setFound(null);
    setError("");
    api("GET", "/row/lineage?" + query({ id })).then(
      (said) => gone || setFound(said.lineage),
      (e) => gone || setError(e.message),
    );
    return () => (gone = true);
  }, [id]);
  if (error) return html`<p class="soft">${error}</p>`;
  if (!found) return html`<p class="soft">Looking for what it grew from \u2026</p>`;
  if (!found.length) return html`<p class="soft">Lineage is kept in runs.</p>`;
  return html`<ol class="tree">${found.map(
    (entry) => html`<li class=${`depth-${Math.min(entry.depth, 6)}`}>
      <span class="chip">${entry.kind}</span> <${Short} text=${entry.text || entry.id} />
      <span class="soft"> ${["task", "generator", "origin", "judge", "template"].filter((n) => entry[n]).map((n) => html`<span class="fact">${n} <${Short} text=${value(entry[n])} /></span> `)}</span>
    </li>`,
  )}</ol>`;
}

function Row({ source, place }) {
  const [found, setFound] = useState(null);
  const [error, setError] = useState("");
  const [compares, setCompares] = useState(false);
  useEffect(() => {
    let gone = false;
    setError("");
    api("GET", "/row?" + query({ source, place })).then(
      (said) => gone || setFound(said),
      (e) => gone || setError(e.message),
    );
    return () => (gone = true);
  }, [source, place]);
  if (error) return html`<p class="bad">${error}</p>`;
  if (!found) return html`<p class="soft">Loading \u2026</p>`;
  const { row, siblings, people } = found;
  const more = (one) => (part, from) => "/row/text?" + query({ source: one.source, place: one.place, part, from });
  const answers = [row, ...siblings].flatMap((one) => one.answers.map((answer, i) => ({ one, answer, part: one.messages.length + i })));
  return html`<article class="row">
    <h2>${row.kind.replace(/s$/, "")} <code><${Short} text=${row.id} /></code></h2>
    ${row.answers.length !== 1 && html`<${Facts} facts=${row.facts} />`}
    ${row.messages.length > 0 && html`<div class="card talk"><${Conversation} messages=${row.messages} more=${more(row)} /></div>`}
    ${row.kind !== "samples" && answers.length > 1 && html`<label class="check"><input type="checkbox" checked=${compares} onChange=${(e) => setCompares(e.target.checked)} /> Mark the words that the first answer does not have</label>`}
    <div class="sides many">${answers.map(
      ({ one, answer, part }, i) => html`<div class="card side ${i === 0 && siblings.length ? "own" : ""}">
        <h3>${i && one !== row ? "another answer" : answer.label}</h3>
        <${Text} text=${answer.text} length=${answer.length} more=${(from) => more(one)(part, from)} beside=${compares && i ? answers[0].answer.text : undefined} />
        ${row.answers.length === 1 && html`<${Facts} facts=${one.facts} />`}
      </div>`,
    )}</div>
    ${people.length > 0 &&
    html`<h3>What people said</h3><ul class="plain">${people.map(
      (one) => html`<li><span class="chip">${one.person}</span> ${Object.entries(one.content).filter(([, v]) => v !== "" && v !== false).map(([n, v]) => html`<span class="fact">${n} <${Short} text=${value(v)} /></span> `)} <span class="soft"><${When} at=${one.at} /></span></li>`,
    )}</ul>`}
    <h3>What it grew from</h3>
    ${row.at ? html`<p class="soft"><${Short} text=${row.at} /> of <code><${Short} text=${row.source} /></code></p>` : html`<${Tree} id=${row.id} />`}
  </article>`;
}

export function Rows({ params, go }) {
  const [sources, setSources] = useState(null);
  const [page, setPage] = useState(null);
  const [error, setError] = useState("");
  const [typed, setTyped] = useState(params.filter || "");
  const end = useRef(null);
  const chosen = useRef(""); // by the server, where nobody has
  const source = params.source || chosen.current;
  const address = rowsAddress({ ...params, source: params.source === chosen.current ? "" : params.source });
  const wanted = useRef("");
  useLayoutEffect(() => {
    document.title = "Rows - Studio";
    api("GET", "/sources").then(setSources, (e) => setError(e.message));
  }, []);
  useLayoutEffect(() => {
    wanted.current = address;
    setError("");
    api("GET", address).then(
      (said) => {
        if (wanted.current !== address) return;
        if (!params.source) chosen.current = said.source;
        setPage({ ...said, address });
      },
      (e) => wanted.current === address && (setError(e.message), setPage(null)),
    );
  }, [address]);
  const loadMore = async () => {
    if (!page || !page.more) return;
    try {
      const next = await api("GET", rowsAddress({ ...params, source }, page.rows[page.rows.length - 1].place));
      if (wanted.current === page.address) setPage({ ...page, rows: [...page.rows, ...next.rows], more: next.more });
    } catch (e) {
      setError(e.message);
    }
  };
  useEffect(() => {
    if (!end.current || !page || !page.more) return;
    const watcher = new IntersectionObserver((entries) => entries[0].isIntersecting && loadMore());
    watcher.observe(end.current);
    return () => watcher.disconnect();
  });
  const set = (more) => go("rows", { ...params, source, ...more });
  const names = page ? SHORT_FACTS.filter((name) => page.rows.some((row) => row.facts[name] !== undefined)).slice(0, 3) : [];
  return html`<div class="rows">
    <h1>Rows</h1>
    <form class="bar" onSubmit=${(e) => (e.preventDefault(), set({ filter: typed, place: undefined }))}>
      <label>File <select value=${source} onChange=${(e) => set({ source: e.target.value, filter: "", sort: "", place: undefined })}>
        ${(sources ? sources.sources : []).map((one) => html`<option value=${one.name}>${one.name}</option>`)}
      </select></label>
      <label class="grow">Filter <input type="text" value=${typed} onInput=${(e) => setTyped(e.target.value)} placeholder=${'score < 1.5 and text ~ "sum"'} spellcheck="false" /></label>
      <label>Order <select value=${params.sort || ""} onChange=${(e) => set({ sort: e.target.value, place: undefined })}>
        <option value="">as in the file</option>
        ${(page ? page.fields : []).filter((f) => f !== "text").map((f) => html`<option value=${f}>${f}, smallest first</option><option value=${"-" + f}>${f}, largest first</option>`)}
      </select></label>
      <button type="submit">Filter</button>
    </form>
    <p class="soft" role="status">${error ? html`<span class="bad">${error}</span>` : page ? `${page.total.toLocaleString("en")} rows; columns: ${page.fields.join(", ")}` : "Loading \u2026"}</p>
    <div class="split">
      <div class="list" tabindex="0" role="region" aria-label="Rows">
        <table><thead><tr><th scope="col">row</th>${names.map((name) => html`<th scope="col">${name.replace("_", " ")}</th>`)}</tr></thead>
        <tbody>${(page ? page.rows : []).map(
          (row) => html`<tr key=${row.place} class=${String(row.place) === params.place ? "on" : ""}>
            <td class="text"><a href=${"#/rows?" + query({ ...params, source, place: row.place })}>${row.asked && html`<span class="asked"><${Short} text=${row.asked} /></span>`}<${Short} text=${row.said || "(empty)"} /></a></td>
            ${names.map((name) => html`<td class=${typeof row.facts[name] === "number" ? "num" : ""}>${row.facts[name] === undefined ? "" : html`<${Short} text=${value(row.facts[name])} />`}</td>`)}
          </tr>`,
        )}</tbody></table>
        <div ref=${end}>${page && page.more && html`<button onClick=${loadMore}>More rows</button>`}</div>
      </div>
      <div class="detail" tabindex="0" role="region" aria-label="The chosen row">${params.place !== undefined ? html`<${Row} source=${source} place=${params.place} />` : html`<p class="soft">Choose a row.</p>`}</div>
    </div>
  </div>`;
}
