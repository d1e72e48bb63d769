"""The page's style sheet: one restrained palette in a light and a dark version, one column of text, room for figures.

Knows class names; must not know what is in them. Everything is in the page itself: no font, image or sheet is fetched.
"""

from __future__ import annotations

# Accent is the trained curve, measure is what was measured on held-out data; both keep 4.5:1 against their paper.
_LIGHT = """
  --paper: #ffffff; --sunk: #f6f7f8; --ink: #15181c; --soft: #565d66; --faint: #6f7781; --rule: #e5e7ea;
  --edge: #cfd3d8; --accent: #0b6a72; --accent-soft: #dcefee; --raw: #8dbcbd; --measure: #b4500f;
  --measure-soft: #fbeee2; --good: #1c7042; --good-soft: #e2f2e8; --warn: #7d5a00; --warn-soft: #fbf3da;
"""
_DARK = """
  --paper: #111417; --sunk: #181c20; --ink: #e9ecef; --soft: #a5adb6; --faint: #868f99; --rule: #262b31;
  --edge: #3a4149; --accent: #55c3c4; --accent-soft: #12312f; --raw: #2e6468; --measure: #f0a05a;
  --measure-soft: #33230f; --good: #6fcf97; --good-soft: #14301f; --warn: #e8c468; --warn-soft: #302809;
"""

STYLE = (
    """
:root { color-scheme: light dark;"""
    + _LIGHT
    + """}
@media (prefers-color-scheme: dark) { :root {"""
    + _DARK
    + """} }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.6 Inter, ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; -webkit-font-smoothing: antialiased;
}
main, body > header, body > footer { max-width: 1080px; margin: 0 auto; padding: 0 32px; }
body > header { padding-top: 56px; }
h1, h2, h3, p, dl, dd, figure, pre, ul { margin: 0; padding: 0; }
h1 { font-size: 38px; line-height: 1.15; font-weight: 680; letter-spacing: -0.025em; overflow-wrap: anywhere; }
h2 { font-size: 21px; line-height: 1.3; font-weight: 650; letter-spacing: -0.012em; }
h3 { font-size: 13px; font-weight: 600; color: var(--soft); }
code, pre, .mono { font: 13px/1.65 ui-monospace, "SF Mono", "JetBrains Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
section { padding-top: 64px; }
section > h2 + p, .lead { color: var(--soft); max-width: 68ch; margin-top: 6px; }
section > h2 + *, section > p + * { margin-top: 24px; }
section > h2 + p.lead { margin-top: 6px; }

.eyebrow { display: flex; align-items: center; gap: 12px; margin-bottom: 14px; color: var(--faint); font-size: 13px; font-weight: 550; }
.status { padding: 2px 11px; border-radius: 99px; font-size: 12.5px; font-weight: 600; color: var(--warn); background: var(--warn-soft); }
.status.finished { color: var(--good); background: var(--good-soft); }
.facts { display: flex; flex-wrap: wrap; gap: 2px 0; margin-top: 12px; color: var(--soft); list-style: none; }
.facts li { overflow-wrap: anywhere; }
.facts li:not(:last-child)::after { content: "·"; margin: 0 9px; color: var(--faint); }
.notes { margin-top: 24px; padding: 14px 18px; border-radius: 8px; background: var(--warn-soft); color: var(--warn); list-style: none; overflow-wrap: anywhere; }
.notes li + li { margin-top: 6px; }

.headline { display: grid; grid-template-columns: 5fr 6fr; gap: 0 48px; margin-top: 40px; padding: 32px 0; border: solid var(--rule); border-width: 1px 0; }
.result .loss { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 14px; margin-top: 2px; font-size: 48px; line-height: 1.2; font-weight: 660; letter-spacing: -0.035em; }
.result .loss .was { color: var(--faint); font-weight: 480; }
.result .loss .arrow { color: var(--edge); font-weight: 400; font-size: 36px; }
.result .loss .now { color: var(--measure); }
.result .change { margin-top: 8px; color: var(--soft); }
.result .change b { display: inline-block; margin-right: 8px; padding: 1px 9px; border-radius: 5px; color: var(--measure); background: var(--measure-soft); font-weight: 640; }
.label { color: var(--faint); font-size: 13px; font-weight: 550; }
.tiles { display: grid; grid-template-columns: repeat(3, 1fr); gap: 22px 24px; align-content: center; }
.tiles dd { font-size: 21px; line-height: 1.35; font-weight: 620; letter-spacing: -0.015em; }
.tiles dd small { display: block; font-size: 12.5px; line-height: 1.4; font-weight: 400; letter-spacing: 0; color: var(--soft); }
.tiles dt { color: var(--faint); font-size: 13px; font-weight: 550; }

.charts { display: grid; grid-template-columns: 1fr 1fr; gap: 40px 40px; margin-top: 40px; }
figcaption { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 18px; min-height: 25px; font-size: 13.5px; }
figcaption b { font-weight: 640; }
figcaption .unit { margin-left: 7px; color: var(--faint); }
figcaption .note { color: var(--faint); }
.legend { display: flex; flex-wrap: wrap; gap: 0 16px; color: var(--soft); }
.legend .swatch { width: 20px; height: 10px; margin-right: 6px; }
.drawing { overflow-x: auto; overflow-y: hidden; }
.drawing svg { display: block; width: 100%; height: auto; }
.empty { padding: 44px 0; text-align: center; color: var(--faint); border: 1px dashed var(--rule); border-radius: 8px; margin-top: 10px; }
svg text { font-size: 12px; fill: var(--soft); }
svg .title { fill: var(--faint); }
svg .rule { stroke: var(--rule); }
svg .axis { stroke: var(--edge); }
svg .epoch { stroke: var(--edge); stroke-dasharray: 1 4; stroke-linecap: round; }
.reference line { stroke: var(--faint); stroke-dasharray: 5 4; }
.reference text { fill: var(--faint); font-size: 11.5px; }
.curve .line { fill: none; stroke-width: 2; stroke: var(--accent); stroke-linejoin: round; stroke-linecap: round; }
.curve.raw .line { stroke: var(--raw); stroke-width: 1.2; }
.curve.held-out .line { stroke: var(--measure); stroke-width: 1.5; }
.dot { fill: var(--accent); stroke: var(--paper); stroke-width: 1.5; }
.dot.raw { fill: var(--raw); }
.curve.held-out .dot, .dot.held-out { fill: var(--measure); }
svg .value { fill: var(--measure); font-weight: 640; font-size: 12.5px; paint-order: stroke; stroke: var(--paper); stroke-width: 4px; }
.at rect { fill: transparent; }
.at g { visibility: hidden; pointer-events: none; }
.at:hover g { visibility: visible; }
.at g line { stroke: var(--faint); stroke-width: 1; }
.at g text { fill: var(--ink); font-weight: 560; white-space: pre; }

.answer + .answer { margin-top: 36px; padding-top: 32px; border-top: 1px solid var(--rule); }
.said { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
.answer .question { margin-top: 3px; font-size: 17px; font-weight: 580; letter-spacing: -0.008em; max-width: 76ch; }
.versions { display: grid; grid-template-columns: repeat(3, 1fr); gap: 16px; margin-top: 16px; }
.versions > div { padding: 13px 17px 16px; border-radius: 8px; background: var(--sunk); border-top: 2px solid var(--edge); }
.versions > div.after { background: var(--accent-soft); border-color: var(--accent); }
.versions > div.after h3 { color: var(--accent); }
.versions .said { margin-top: 5px; font-size: 14px; line-height: 1.58; }
.versions .said.none { color: var(--faint); }

.table { overflow-x: auto; }
table { width: 100%; max-width: 680px; border-collapse: collapse; }
th, td { padding: 8px 24px 8px 0; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; vertical-align: baseline; }
th:first-child, td:first-child { text-align: left; white-space: normal; }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--faint); font-size: 13px; font-weight: 550; border-color: var(--edge); }
tbody th { font-weight: 400; color: var(--soft); }
section > .remarks { margin-top: 16px; }
.remarks { color: var(--soft); padding-left: 18px; max-width: 76ch; overflow-wrap: anywhere; }
.remarks li { margin-top: 4px; }

.halves { display: grid; grid-template-columns: 1fr 1fr; gap: 32px 48px; }
.bars { display: grid; gap: 9px; }
.bar-row { display: grid; grid-template-columns: 170px 1fr 84px; gap: 14px; align-items: center; font-size: 14px; }
.bar-row svg { display: block; width: 100%; height: 9px; }
.bar-row .label { color: var(--soft); font-weight: 400; font-size: 14px; overflow-wrap: anywhere; line-height: 1.35; }
.bar-row .amount { text-align: right; }
.track { fill: var(--sunk); } .bar { fill: var(--accent); }
.sum { display: flex; flex-wrap: wrap; gap: 4px 32px; margin-top: 16px; padding-top: 14px; border-top: 1px solid var(--rule); color: var(--soft); }
.sum b { color: var(--ink); font-weight: 620; }

.cards { columns: 3; column-gap: 40px; }
pre + .cards { margin-top: 32px; }
.card { break-inside: avoid; padding-bottom: 28px; }
.card h3 { padding-bottom: 6px; border-bottom: 1px solid var(--edge); color: var(--ink); font-size: 14px; }
.pairs div { display: flex; justify-content: space-between; gap: 18px; padding: 4px 0; border-bottom: 1px solid var(--rule); font-size: 13.5px; }
.pairs dt { color: var(--soft); overflow-wrap: anywhere; flex: 0 0 auto; max-width: 60%; }
.pairs dd { min-width: 0; text-align: right; overflow-wrap: anywhere; color: var(--soft); }
.pairs .chosen dd, .pairs .chosen dt { color: var(--ink); font-weight: 600; }
.plain .pairs dd { color: var(--ink); }
details { margin-top: 8px; }
summary { cursor: pointer; color: var(--accent); font-weight: 550; font-size: 14px; }
pre { margin-top: 12px; padding: 16px 20px; border-radius: 8px; background: var(--sunk); white-space: pre-wrap; overflow-wrap: anywhere; }
pre .comment { color: var(--faint); }
body > footer { margin-top: 72px; padding-top: 20px; padding-bottom: 48px; color: var(--faint); font-size: 13px; }
body > footer p { padding-top: 18px; border-top: 1px solid var(--rule); }

@media (max-width: 900px) {
  .headline { grid-template-columns: 1fr; gap: 32px; }
  .cards { columns: 2; }
}
@media (max-width: 720px) {
  main, body > header, body > footer { padding-left: 20px; padding-right: 20px; }
  body > header { padding-top: 32px; }
  h1 { font-size: 30px; }
  section { padding-top: 48px; }
  .charts, .halves, .versions { grid-template-columns: 1fr; }
  .versions { gap: 10px; }
  .drawing svg.wide { width: 720px; max-width: none; }
  .bar-row { grid-template-columns: 1fr 84px; gap: 2px 14px; }
  .bar-row svg { grid-column: 1 / -1; grid-row: 2; }
}
@media (max-width: 560px) {
  .tiles { grid-template-columns: 1fr 1fr; }
  .result .loss { font-size: 38px; }
  .cards { columns: 1; }
}
@media print {
  :root { color-scheme: light;"""
    + _LIGHT
    + """}
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  body { font-size: 11pt; }
  body > header { padding-top: 0; }
  section { padding-top: 32px; }
  figure, .answer, .card, .headline, tr, .bar-row { break-inside: avoid; }
  h2 { break-after: avoid; }
  .read-outs, details { display: none; }
}
"""
)
