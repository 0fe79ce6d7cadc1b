// The run as it goes: stages, curves, monitors, alarms, and the checks that it waits for. It asks again every few seconds.

import { html, useEffect, useRef, useState } from "./vendor/preact-htm.js";
import { api } from "./api.js";
import { query } from "./early.js";
import { Short, When } from "./text.js";

const SECONDS = 3;
const DONE = { approve: "approved", stop: "stopped" };
const MAX_POINTS = 1200;
const MAX_CURVES = 6;
const short = (x) => (Math.abs(x) >= 1000 || (x !== 0 && Math.abs(x) < 0.01) ? x.toExponential(1) : String(Math.round(x * 1000) / 1000));
const percent = (x) => `${Math.round(x * 100)} %`;

// A curve as SVG: its shape is also said in words.
export function Curve({ name, points, width = 300, height = 96 }) {
  if (points.length < 2) return html`<figure class="curve"><figcaption>${name}</figcaption><p class="soft">${points.length ? short(points[0][1]) : "no steps yet"}</p></figure>`;
  const xs = points.map((p) => p[0]);
  const ys = points.map((p) => p[1]);
  const [low, high] = [Math.min(...ys), Math.max(...ys)];
  const x = (v) => ((v - xs[0]) / (xs[xs.length - 1] - xs[0] || 1)) * (width - 4) + 2;
  const y = (v) => height - 4 - ((v - low) / (high - low || 1)) * (height - 8);
  const path = points.map((p, i) => `${i ? "L" : "M"}${x(p[0]).toFixed(1)} ${y(p[1]).toFixed(1)}`).join("");
  const words = `${name.replaceAll("_", " ")}: from ${short(ys[0])} to ${short(ys[ys.length - 1])}`;
  return html`<figure class="curve"><figcaption>${words}</figcaption>
    <svg class="chart" role="img" aria-label=${words} viewBox=${`0 0 ${width} ${height}`} preserveAspectRatio="none"><path d=${path} fill="none" vector-effect="non-scaling-stroke" /></svg>
    <p class="soft">${short(low)} to ${short(high)}, ${points.length.toLocaleString("en")} points</p></figure>`;
}

function Curves({ stage, running }) {
  const [found, setFound] = useState({ steps: [], names: [] });
  const [error, setError] = useState("");
  const state = useRef({ stage: "", next: 0, steps: [] });
  useEffect(() => {
    state.current = { stage, next: 0, steps: [] };
    let gone = false;
    let timer = 0;
    const load = async () => {
      try {
        const said = await api("GET", `/run/${encodeURIComponent(stage)}?` + query({ after: state.current.next }));
        if (gone) return;
        const kept = said.begin === 0 ? [] : state.current.steps;
        state.current.steps = [...kept, ...said.steps].slice(-MAX_POINTS);
        state.current.next = said.next;
        setFound({ steps: state.current.steps, names: said.names.length ? said.names : found.names });
        setError("");
        if (said.more || running) timer = setTimeout(load, said.more ? 0 : SECONDS * 1000);
      } catch (e) {
        if (!gone) setError(e.message);
      }
    };
    load();
    return () => ((gone = true), clearTimeout(timer));
  }, [stage, running]);
  if (error) return html`<p class="bad">${error}</p>`;
  return html`<div class="curves">${found.names.slice(0, MAX_CURVES).map(
    (name) => html`<${Curve} key=${name} name=${name} points=${found.steps.filter((s) => s[name] !== undefined).map((s) => [s.step, s[name]])} />`,
  )}</div>`;
}

function Check({ check, role, changed }) {
  const [error, setError] = useState("");
  const [sure, setSure] = useState("");
  const decide = async (decision) => {
    try {
      await api("POST", `/checks/${check.stage}`, { decision });
      setSure("");
    } catch (e) {
      setError(e.message);
    }
    changed();
  };
  const looked = check.accept + check.repair + check.reject;
  const share = check.wrong.n ? `${percent(check.wrong.mean)} wrong, 95 % interval ${percent(check.wrong.ci95[0])} to ${percent(check.wrong.ci95[1])}` : "nobody has looked yet";
  return html`<li class="card check-card">
    <h3>Round ${check.round}: ${check.decision ? `${DONE[check.decision.decision]} by ${check.decision.by}` : "the run waits for people"}</h3>
    <p>${check.rows} of ${check.of.toLocaleString("en")} rows, drawn by seed ${check.seed}; ${looked ? `${looked} looked at: ${check.accept} accepted, ${check.repair} repaired, ${check.reject} rejected; ` : ""}${share}.</p>
    <p class="soft">${check.decision ? html`Decided <${When} at=${check.decision.at} />.` : html`Without a decision by <${When} at=${check.until} />: ${check.default}.`}</p>
    <div class="buttons">
      ${check.project && !check.decision && role !== "reader" && html`<a class="button" href=${`#/work/${check.project}`}>Look at the rows</a>`}
      ${!check.decision && role !== "reader" && !sure && html`<button class="primary" onClick=${() => setSure("approve")}>Approve</button><button onClick=${() => setSure("stop")}>Stop the run</button>`}
      ${sure && html`<span>${sure === "approve" ? "Train on these rows, without the rejected ones?" : "End the run before it trains on them?"}</span><button class="primary" onClick=${() => decide(sure)}>Yes, ${sure}</button><button onClick=${() => setSure("")}>No</button>`}
    </div><p class="bad" role="status">${error}</p></li>`;
}

function Monitors({ monitors }) {
  const names = [...new Set(monitors.flatMap((m) => Object.keys(m.values)))].filter((name) => name !== "tokens");
  return html`<div class="wide"><table><caption>Collapse monitors</caption><thead><tr><th scope="col">after</th>${names.map((n) => html`<th scope="col" class="num">${n.replaceAll("_", " ")}</th>`)}<th scope="col">alarms</th></tr></thead>
    <tbody>${monitors.map((m) => html`<tr><th scope="row">${m.stage}</th>${names.map((n) => html`<td class="num">${m.values[n] === undefined ? "\u2013" : short(m.values[n])}</td>`)}<td>${m.alarms.join(", ") || "none"}</td></tr>`)}</tbody></table></div>`;
}

export function Run({ me, params, go }) {
  const [found, setFound] = useState(null);
  const [checks, setChecks] = useState([]);
  const [error, setError] = useState("");
  const [stamp, setStamp] = useState(0);
  useEffect(() => {
    document.title = "Run - Studio";
    let gone = false;
    let timer = 0;
    const load = async () => {
      try {
        const [run, said] = await Promise.all([api("GET", "/run"), api("GET", "/checks")]);
        if (gone) return;
        setFound(run);
        setChecks(said.checks);
        setError("");
      } catch (e) {
        if (!gone) setError(e.message);
      }
      if (!gone) timer = setTimeout(load, SECONDS * 1000);
    };
    load();
    return () => ((gone = true), clearTimeout(timer));
  }, [stamp]);
  if (!found) return html`<h1>Run</h1><p class=${error ? "bad" : "soft"}>${error || "Loading \u2026"}</p>`;
  const curved = found.stages.filter((s) => s.curves);
  const chosen = params.stage || (curved.find((s) => s.folder === found.running) || curved[curved.length - 1] || {}).folder || "";
  const state = found.finished ? "finished" : found.running ? html`working on <b>${found.running}</b>` : "not finished, and nothing is written at present";
  return html`<div class="run">
    <h1>Run ${found.name}</h1>
    <p role="status">${found.stages.filter((s) => s.done).length} of ${found.stages.length} stages that have begun are done; ${state}.${error && html` <span class="bad">${error}</span>`}</p>
    ${found.alarms.map((text) => html`<p class="banner"><b>Alarm.</b> <${Short} text=${text} /></p>`)}
    ${checks.length > 0 && html`<h2>Checks before training</h2><ul class="plain">${[...checks].reverse().map((c) => html`<${Check} key=${c.stage} check=${c} role=${me.role} changed=${() => setStamp(stamp + 1)} />`)}</ul>`}
    ${chosen && html`<section class="card"><div class="bar"><label>Curves of <select value=${chosen} onChange=${(e) => go("run", { stage: e.target.value })}>${curved.map((s) => html`<option value=${s.folder}>${s.folder}</option>`)}</select></label></div>
      <${Curves} stage=${chosen} running=${found.running === chosen} /></section>`}
    <div class="wide"><table><caption>Stages</caption><thead><tr><th scope="col">stage</th><th scope="col" class="num">seconds</th><th scope="col" class="num">peak MiB</th><th scope="col">what it did</th></tr></thead>
      <tbody>${found.stages.map((s) => html`<tr key=${s.folder} class=${s.folder === found.running ? "on" : ""}><th scope="row">${s.folder}</th><td class="num">${s.done ? s.seconds.toFixed(1) : "\u2026"}</td><td class="num">${s.peak_mib || ""}</td><td><${Short} text=${s.done ? s.line : s.folder === found.running ? "under way" : "unfinished"} /></td></tr>`)}</tbody></table></div>
    ${found.monitors.length > 0 && html`<${Monitors} monitors=${found.monitors} />`}
  </div>`;
}
