"""CSS of every page: colours as variables, once for light and once for dark backgrounds."""

STYLE = """
:root {
  --paper: #faf8f3; --card: #ffffff; --ink: #22252a; --soft: #666a70; --line: #e3ded2; --band: #f2eee4;
  --greedy: #0b6e69; --sampled: #b4560f; --good: #1d7a3c; --bad: #b3261e; --hint: #8a6d1a; --wheat: #d9b44a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15171a; --card: #1d2024; --ink: #e8e5dd; --soft: #a0a4ab; --line: #363a41; --band: #282c32;
    --greedy: #55c7bd; --sampled: #f0a35c; --good: #6fcf8b; --bad: #ff8a80; --hint: #e2c268; --wheat: #d9b44a;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body {
  margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5; font-size: 15px;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  border-top: 5px solid var(--wheat);
}
main, header.top, nav div { max-width: 1120px; margin: 0 auto; padding: 0 24px; }
header.top { padding-top: 36px; padding-bottom: 4px; }
h1, h2, h3 { font-family: "Iowan Old Style", "Palatino Linotype", Palatino, Georgia, "DejaVu Serif", serif; font-weight: 600;
  line-height: 1.2; }
h1 { font-size: 38px; margin: 0; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 26px; margin: 64px 0 6px; }
h3 { font-size: 18px; margin: 28px 0 8px; }
p { margin: 6px 0 12px; max-width: 78ch; }
.soft, .note { color: var(--soft); }
.note { font-size: 13.5px; }
.eyebrow { color: var(--hint); font-size: 12.5px; font-weight: 650; letter-spacing: .12em; text-transform: uppercase; margin: 0 0 6px; }
nav { position: sticky; top: 0; background: var(--paper); border-bottom: 1px solid var(--line); margin-top: 18px; z-index: 2; }
nav div { display: flex; gap: 20px; overflow-x: auto; padding-top: 9px; padding-bottom: 9px; font-size: 14px; }
nav a { color: var(--soft); text-decoration: none; white-space: nowrap; }
nav a:hover { color: var(--ink); text-decoration: underline; }
section { scroll-margin-top: 30px; }
.banner {
  max-width: none; border: 1px solid var(--hint); border-left-width: 6px; border-radius: 8px; padding: 10px 16px;
  margin: 16px 0 0; background:
  var(--card); }
.banner b { color: var(--hint); }
.cards { display: flex; flex-wrap: wrap; gap: 16px; margin: 26px 0 8px; }
.card {
  background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 18px 20px; flex: 1 1 290px; min-width: 0;
}
.card:first-child { flex: 1.35 1 370px; }
.card .label { color: var(--soft); font-size: 13px; margin: 0; }
.card .big { font-size: 32px; font-weight: 620; letter-spacing: -0.02em; font-variant-numeric: tabular-nums; margin: 2px 0 2px;
  white-space: nowrap; }
.card .big small { font-size: 14px; color: var(--soft); font-weight: 450; letter-spacing: 0; white-space: normal; }
.card p { margin: 3px 0; font-size: 13.5px; }
.card .row { display: flex; gap: 4px 26px; flex-wrap: wrap; margin-top: 6px; }
.card p.title { font-weight: 620; font-size: 14px; margin: 0 0 4px; }
ul.lines { margin: 14px 0 6px; padding: 12px 16px; list-style: none; font-size: 13.5px; background: var(--band); border-radius: 10px; }
ul.lines li { margin: 3px 0; overflow-wrap: anywhere; }
.plain { border-left: 4px solid var(--bad); background: var(--card); border-radius: 0 10px 10px 0; padding: 8px 18px; margin: 16px 0; }
.plain h3 { margin-top: 8px; }
.plain.fine { border-color: var(--good); }
.plain ul { margin: 4px 0 8px; padding-left: 18px; }
.plain li { margin: 3px 0; }
.figure { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 16px 18px 12px; margin: 14px 0;
  overflow-x: auto; }
.figure > svg { display: block; width: 100%; height: auto; }
.figure.wideplot > svg { min-width: 720px; } .funnels > .figure > svg, .figure.medium > svg { min-width: 360px; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 310px), 1fr)); gap: 14px; margin: 14px 0; }
.grid .figure { margin: 0; }
.grid.funnels { grid-template-columns: repeat(auto-fill, minmax(min(100%, 460px), 1fr)); }
.figure.medium { max-width: 620px; } .wide.medium { max-width: 620px; }
.figure .title { font-weight: 620; margin: 0 0 2px; font-size: 14px; }
.figure .sub { color: var(--soft); font-size: 12.5px; margin: 0 0 6px; }
.legend { display: flex; gap: 18px; flex-wrap: wrap; font-size: 13px; color: var(--soft); margin: 0 0 4px; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px; vertical-align: -1px; }
.wide { overflow-x: auto; margin: 12px 0; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 550; font-size: 12.5px; border-bottom: 1px solid var(--line); padding: 6px
  10px; vertical-align: bottom; white-space: nowrap; }
td { border-bottom: 1px solid var(--line); padding: 6px 10px; vertical-align: top; }
tr.round td { background: var(--band); font-weight: 620; border-bottom: none; }
.num { text-align: right; white-space: nowrap; }
td small, .ci { color: var(--soft); font-size: 11.5px; font-weight: 400; white-space: nowrap; }
td:first-child small { white-space: normal; }
td.heat { background: color-mix(in srgb, var(--hue) calc(var(--v) * 34%), transparent); }
.up { color: var(--good); font-weight: 620; } .down { color: var(--bad); font-weight: 620; } .flat { color: var(--soft); }
.bar { display: inline-block; height: 9px; border-radius: 2px; background: var(--greedy); vertical-align: 0; min-width: 1px; }
.chip { display: inline-block; border: 1px solid var(--line); border-radius: 99px; padding: 0 9px; font-size: 12px; color:
  var(--soft); background: var(--band); white-space: nowrap; max-width: 100%; overflow: hidden; text-overflow: ellipsis;
  vertical-align: middle; }
.chip.good { color: var(--good); border-color: currentColor; } .chip.bad { color: var(--bad); border-color: currentColor; }
.chip.hint { color: var(--hint); border-color: currentColor; }
details { margin: 10px 0; }
summary { cursor: pointer; color: var(--soft); }
details[open] > summary { margin-bottom: 6px; }
details.task > summary { color: var(--ink); font-weight: 620; font-size: 16px; padding: 7px 0; border-bottom: 1px solid var(--line); }
.sample { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 12px 16px; margin: 12px 0; }
p.lineage { max-width: none; } .lineage { font-size: 12.5px; color: var(--soft); margin: 0 0 8px; display: flex; gap: 6px; flex-wrap:
  wrap; align-items: center; }
.turn { display: grid; grid-template-columns: 74px 1fr; gap: 10px; margin: 4px 0; }
.turn .who { color: var(--soft); font-size: 12.5px; padding-top: 1px; }
.said { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; max-height: 15em; overflow-y: auto; font-size: 13.5px;
  min-width: 0; }
.answer { border-top: 1px dashed var(--line); padding: 8px 0 2px; }
.answer.kept { box-shadow: inset 3px 0 0 var(--good); padding-left: 12px; }
.answer.rejected { box-shadow: inset 3px 0 0 var(--bad); padding-left: 12px; }
.answer .facts { font-size: 12px; color: var(--soft); display: flex; gap: 6px 12px; flex-wrap: wrap; align-items: center; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; overflow-x: auto; font-size:
  12.5px; line-height: 1.45; }
footer { color: var(--soft); font-size: 13px; max-width: 1120px; margin: 70px auto 40px; padding: 14px 24px 0; border-top: 1px solid
  var(--line); }
svg text { font-family: inherit; fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
svg .strong { fill: var(--ink); font-weight: 620; }
svg .axis { stroke: var(--line); stroke-width: 1; } svg .base { stroke: var(--soft); stroke-width: 1; }
svg .band { fill: var(--band); }
svg .greedy { stroke: var(--greedy); fill: var(--greedy); } svg .sampled { stroke: var(--sampled); fill: var(--sampled); }
svg text.greedy, svg text.sampled { stroke: none; font-weight: 620; }
svg .curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .faint { stroke-width: 1; opacity: .35; } svg .whisker { stroke-width: 1.4; opacity: .6; }
svg .hollow { fill: var(--card); stroke-width: 1.6; }
svg .before { fill: var(--soft); opacity: .32; } svg .after { fill: var(--greedy); opacity: .62; }
svg .mark { stroke: var(--ink); stroke-width: 1.4; stroke-dasharray: 3 3; } svg .mark.light { stroke: var(--soft); }
svg .alarm { fill: var(--bad); opacity: .13; } svg .level { stroke: var(--bad); stroke-width: 1.3; stroke-dasharray: 5 4; }
svg .track { fill: var(--band); } svg .fill { fill: var(--greedy); } svg .fill2 { fill: var(--sampled); } svg .fill3 { fill:
  var(--wheat); }
@media print { nav { display: none; } body { background: #fff; } }
@media (max-width: 640px) { main, header.top, nav div { padding-left: 16px; padding-right: 16px; } h1 { font-size: 30px; } .turn {
  grid-template-columns: 1fr; gap: 0; } }
"""
