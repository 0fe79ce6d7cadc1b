// What a person says of an item: five attributes, or which of two answers is better. Stateless: values come in, choices go out.

import { html } from "./vendor/preact-htm.js";

export const ATTRIBUTES = ["helpfulness", "correctness", "coherence", "complexity", "verbosity"];
export const LETTERS = "asdfg";
const RUBRIC = {
  helpfulness: ["Useless.", "Borderline, of little use.", "Partly helps, misses the goal somewhere.", "Mostly helps, room to improve.", "Fully in the spirit of the request."],
  correctness: ["Entirely wrong or off topic.", "Mostly wrong or incomplete.", "A mix of right and wrong.", "A small omission, nothing misleading.", "Complete, nothing false or missing."],
  coherence: ["Incomprehensible.", "Mostly unclear.", "A little unclear.", "Mostly clear.", "Perfectly clear and consistent."],
  complexity: ["Basic: a child could write it.", "Simple: some schooling.", "Intermediate: high school.", "Advanced: a college major.", "Expert."],
  verbosity: ["Succinct for what was asked.", "Pretty short.", "Average.", "Moderately long.", "Verbose for what was asked."],
};
export const STRENGTHS = [-3, -2, -1, 0, 1, 2, 3];
const WORDS = { 1: "slightly better", 2: "better", 3: "much better" };
const strengthWords = (s) => (s === 0 ? "About the same" : `${s < 0 ? "Left" : "Right"} is ${WORDS[Math.abs(s)]}`);

export const VERDICTS = ["accept", "repair", "reject"];
const VERDICT_WORDS = {
  accept: "Accept: a model should answer like this",
  repair: "Repair: nearly right, I mend it",
  reject: "Reject: nothing to learn from",
};

export function complete(kind, draft) {
  if (kind === "check") return VERDICTS.includes(draft.verdict) && (draft.verdict !== "repair" || Boolean((draft.text || "").trim()));
  return kind === "rate" ? ATTRIBUTES.every((name) => draft[name] !== undefined) : draft.neither === true || draft.preference !== undefined;
}

export function content(kind, draft) {
  const reason = draft.reason || "";
  if (kind === "check") return { verdict: draft.verdict, reason, ...(draft.verdict === "repair" ? { text: draft.text } : {}) };
  if (kind === "pair") return draft.neither ? { neither: true, reason } : { preference: draft.preference, neither: false, reason };
  const out = { unsafe: draft.unsafe === true, reason };
  for (const name of ATTRIBUTES) out[name] = draft[name];
  if (draft.confidence) out.confidence = draft.confidence;
  return out;
}

function Choice({ name, value, checked, onChoose, label, hint, wide }) {
  return html`<label class="choice ${checked ? "on" : ""} ${wide ? "wide" : ""}" title=${hint}>
    <input type="radio" name=${name} value=${value} checked=${checked} onChange=${onChoose} />
    <span class="mark">${label}</span>
  </label>`;
}

function Attribute({ name, draft, active, onValue, keys }) {
  const value = draft[name];
  return html`<fieldset class="attribute ${active ? "active" : ""}">
    <legend>${name} <span class="rubric">${value === undefined ? (active ? "0 least, 4 most" : "") : RUBRIC[name][value]}</span></legend>
    <div class="choices">
      ${RUBRIC[name].map(
        (sentence, level) =>
          html`<${Choice} key=${level} name=${name} value=${level} checked=${value === level} hint=${sentence} onChoose=${() => onValue(name, level)}
            label=${html`${level}${keys && html`<kbd aria-hidden="true">${LETTERS[level]}</kbd>`}`} />`,
      )}
    </div>
  </fieldset>`;
}

export function RatePanel({ draft, cursor, onValue, keys }) {
  return html`<div>
    ${ATTRIBUTES.map((name, i) => html`<${Attribute} key=${name} name=${name} draft=${draft} active=${cursor === i} onValue=${onValue} keys=${keys} />`)}
    <div class="extras">
      <label class="check"><input type="checkbox" checked=${draft.unsafe === true} onChange=${(e) => onValue("unsafe", e.target.checked)} /> unsafe${keys && html` <kbd aria-hidden="true">e</kbd>`}</label>
      <label>sure? <select value=${String(draft.confidence || "")} onChange=${(e) => onValue("confidence", Number(e.target.value) || undefined)}>
        <option value="">\u2013</option><option value="1">guess</option><option value="2">fairly</option><option value="3">certain</option>
      </select></label>
    </div>
  </div>`;
}

export function ComparePanel({ draft, onValue, keys }) {
  return html`<fieldset class="strengths">
    <legend>Which answer is better?</legend>
    <div class="choices">
      ${STRENGTHS.map(
        (s, i) =>
          html`<${Choice} key=${s} name="preference" value=${s} checked=${!draft.neither && draft.preference === s} wide=${true} onChoose=${() => onValue("preference", s)}
            label=${html`${strengthWords(s)}${keys && html`<kbd aria-hidden="true">${i + 1}</kbd>`}`} />`,
      )}
      <${Choice} name="preference" value="neither" checked=${draft.neither === true} wide=${true} onChoose=${() => onValue("neither", true)}
        label=${html`Neither is acceptable${keys && html`<kbd aria-hidden="true">n</kbd>`}`} />
    </div>
  </fieldset>`;
}

export function CheckPanel({ draft, onValue, keys }) {
  return html`<fieldset class="verdicts">
    <legend>Should a model learn from this answer?</legend>
    <div class="choices stacked-choices">${VERDICTS.map(
      (verdict, i) =>
        html`<${Choice} key=${verdict} name="verdict" value=${verdict} checked=${draft.verdict === verdict} wide=${true} onChoose=${() => onValue("verdict", verdict)}
          label=${html`${VERDICT_WORDS[verdict]}${keys && html`<kbd aria-hidden="true">${i + 1}</kbd>`}`} />`,
    )}</div>
    ${draft.verdict === "repair" &&
    html`<label class="reason">The answer as it should be<textarea id="repair" rows="8" value=${draft.text || ""} onInput=${(e) => onValue("text", e.target.value)}></textarea></label>`}
  </fieldset>`;
}

export function Reason({ draft, onValue }) {
  return html`<label class="reason">Why, in a sentence or two (if you like)
    <textarea rows="2" maxlength="2000" value=${draft.reason || ""} onInput=${(e) => onValue("reason", e.target.value)}></textarea>
  </label>`;
}
