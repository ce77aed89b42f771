"""The style sheet of `page`: light or dark as the reader's system is."""

STYLE = """
:root {
  --paper: #fbfaf7; --sheet: #ffffff; --ink: #22252b; --soft: #6b7280; --line: #e4e1da; --accent: #2f6f4f;
  --target: #c9efd5; --target-ink: #0b4a2a; --target-edge: #52b77e; --control: #9a5b13; --warn: #b7791f; --bad: #c53030;
  --c0: #2f7d57; --c1: #c2571a; --c2: #3467c1; --c3: #9440a8; --c4: #a3850a; --c5: #0e8a94; --shade: #0002;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15171b; --sheet: #1d2026; --ink: #e4e6ea; --soft: #959ca8; --line: #30343c; --accent: #6fcf97;
    --target: #17452d; --target-ink: #c8f7da; --target-edge: #2f8f5b; --control: #e0a458; --warn: #ecc94b;
    --bad: #fc8181;
    --c0: #6fcf97; --c1: #f2995c; --c2: #84a9f5; --c3: #d592e6; --c4: #e0c04c; --c5: #5cc9d1; --shade: #000a;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { margin: 0; font-size: 1.9rem; letter-spacing: -0.02em; overflow-wrap: anywhere; }
header p { margin: 0.3rem 0 0; color: var(--soft); overflow-wrap: anywhere; }
h2 { margin: 0 0 0.9rem; font-size: 1.05rem; overflow-wrap: anywhere; }
section { margin-top: 1.5rem; padding: 1.3rem 1.5rem; background: var(--sheet); border: 1px solid var(--line);
  border-radius: 12px; }
.figures { display: flex; flex-wrap: wrap; align-items: center; gap: 0.5rem 1.1rem; margin-top: 1.6rem; }
.figures div { display: flex; flex-direction: column; }
.figures strong { font-size: 1.75rem; line-height: 1.15; font-variant-numeric: tabular-nums; letter-spacing: -0.02em; }
.figures.apart { gap: 0.7rem 2.4rem; }
.figures span { color: var(--soft); font-size: 0.88rem; }
.figures i { color: var(--soft); font-style: normal; font-size: 1.3rem; }
.figures div:last-child strong { color: var(--accent); }
.notes { margin: 0; padding: 0; list-style: none; }
.notes > li { display: flex; gap: 0.7rem; padding: 0.28rem 0; }
.sign { flex: none; width: 1.4rem; height: 1.4rem; border-radius: 50%; text-align: center; line-height: 1.4rem;
  font-size: 0.85rem; color: var(--sheet); background: var(--accent); }
.warning .sign { background: var(--warn); } .bad .sign { background: var(--bad); } .bad { font-weight: 600; }
.notes ul, .notes pre { margin: 0.15rem 0 0; padding: 0; list-style: none; font-size: 0.86rem; color: var(--soft);
  font-weight: 400; overflow-wrap: anywhere; white-space: pre-wrap; }
.wide { overflow-x: auto; background: linear-gradient(to right, var(--sheet) 40%, transparent) local,
  linear-gradient(to left, var(--sheet) 40%, transparent) local right,
  linear-gradient(to right, var(--shade), transparent) scroll,
  linear-gradient(to left, var(--shade), transparent) scroll right;
  background-size: 3rem 100%, 3rem 100%, 1rem 100%, 1rem 100%; background-repeat: no-repeat; }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; }
th { color: var(--soft); font-weight: 500; font-size: 0.84rem; }
th, td { padding: 0.38rem 0.7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td.words { overflow-wrap: anywhere; min-width: 6rem; } td.words:first-child { min-width: 8rem; }
td.words:last-child:nth-child(n + 3) { min-width: 18rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.total td { font-weight: 650; } tbody tr:last-child td { border-bottom: 0; }
.foot { margin: 0.7rem 0 0; color: var(--soft); font-size: 0.86rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.28rem 1.4rem; margin: 0; font-size: 0.93rem; }
dt { color: var(--soft); } dd { margin: 0; font-variant-numeric: tabular-nums; min-width: 0; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; }
svg rect { fill: var(--accent); opacity: 0.82; } svg g:hover rect { opacity: 1; }
svg line { stroke: var(--line); }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; text-anchor: middle; }
svg .count { fill: var(--ink); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 1.7rem 2.2rem; }
.plots figure { margin: 0; min-width: 0; } .plots figure:first-child { grid-column: 1 / -1; }
figcaption { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0.1rem 0.8rem; margin-bottom: 0.6rem;
  font-size: 0.93rem; }
figcaption span { color: var(--soft); font-size: 0.84rem; }
.keys { display: flex; flex-wrap: wrap; gap: 0.1rem 1rem; margin-left: auto; }
.key { white-space: nowrap; } svg.key { display: inline-block; width: 22px; height: 8px; margin-right: 0.35rem; }
.plot { padding: 4px 4px 24px 52px; } .plot > svg { height: 220px; overflow: visible; }
.plot svg svg { height: 100%; overflow: visible; }
.plot text.ends { text-anchor: end; } .plot text.begins { text-anchor: start; }
svg path { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round;
  vector-effect: non-scaling-stroke; }
svg path.faint { stroke-width: 1; opacity: 0.3; } svg path.sparse { stroke-dasharray: 5 3; stroke-width: 1.6; }
svg circle { fill: currentColor; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.c4 { color: var(--c4); } .c5 { color: var(--c5); }
svg .at rect { fill: transparent; } .at > :not(rect) { visibility: hidden; pointer-events: none; }
.at:hover > :not(rect) { visibility: visible; } .at line { stroke: var(--soft); }
.at text { fill: var(--ink); font-weight: 600; paint-order: stroke; stroke: var(--sheet); stroke-width: 5px; }
.reply { padding-top: 1rem; border-top: 1px solid var(--line); } .reply:first-of-type { border-top: 0; padding-top: 0; }
.reply dd { white-space: pre-wrap; overflow-wrap: anywhere;
  font: 0.86rem/1.6 ui-monospace, "SF Mono", "DejaVu Sans Mono", Menlo, Consolas, monospace; }
.reply dl dd:nth-of-type(3) { color: var(--accent); }
.legend { display: flex; flex-wrap: wrap; align-items: center; gap: 0.4rem 1.2rem; margin: 0; font-size: 0.9rem; }
.legend > span { color: var(--soft); } .legend mark { padding: 0.1rem 0.5rem; }
.switch { margin-left: auto; color: var(--soft); cursor: pointer; }
article { margin-top: 1.4rem; }
article h3 { margin: 0; font-size: 0.98rem; overflow-wrap: anywhere; }
article p { margin: 0.1rem 0 0.5rem; color: var(--soft); font-size: 0.88rem; }
.sample { max-height: 90rem; overflow: auto; padding: 0.9rem 1.1rem; border: 1px solid var(--line); border-radius: 9px;
  background: var(--paper); color: var(--soft); white-space: pre-wrap; overflow-wrap: anywhere;
  font: 0.86rem/1.7 ui-monospace, "SF Mono", "DejaVu Sans Mono", Menlo, Consolas, monospace; }
mark { background: var(--target); color: var(--target-ink); border-radius: 4px; padding: 0.12em 0;
  box-shadow: inset 0 -2px 0 var(--target-edge); box-decoration-break: clone; -webkit-box-decoration-break: clone; }
.control { color: var(--control); } mark .control { font-weight: 650; }
.end { opacity: 0.45; user-select: none; }
details { display: inline; } details[open] > summary { opacity: 0.5; }
details.more { display: block; margin-top: 0.8rem; } details.more dl { margin-top: 0.8rem; }
summary { display: inline; cursor: pointer; padding: 0 0.5rem; border: 1px dashed var(--line); border-radius: 5px;
  color: var(--accent); font-family: system-ui, sans-serif; font-size: 0.82rem; }
body:has(.tokens:checked) .t { outline: 1px solid var(--line); outline-offset: -1px; }
body:has(.tokens:checked) .t:hover { outline-color: var(--accent); }
@media (max-width: 640px) {
  main { padding: 1.5rem 0.8rem 3rem; } section { padding: 1.1rem 1rem; } h1 { font-size: 1.5rem; }
  dl { grid-template-columns: minmax(0, 1fr); gap: 0; } dd { margin-bottom: 0.45rem; } dt { overflow-wrap: anywhere; }
  .figures strong { font-size: 1.4rem; } .figures.apart { gap: 0.6rem 1.6rem; }
  .keys, .switch { margin-left: 0; } td.words:not(:first-child):nth-child(n) { min-width: 9rem; }
}
@media print { main { max-width: none; } .sample { max-height: none; } .switch { display: none; } }
"""
