"""The style sheet of the report, inline so that the page needs no other file."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #f4f6f9; --card: #ffffff; --ink: #1d2430; --quiet: #5b6675; --line: #d9dee6;
  --good: #00694d; --bad: #a63a00; --up: 0, 114, 178; --down: 230, 120, 0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f1319; --card: #171c24; --ink: #e6eaf0; --quiet: #9aa5b4; --line: #2d3541;
    --good: #4cc9a0; --bad: #ff9a5c; --up: 86, 180, 233; --down: 240, 144, 60;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1120px; padding: 24px 16px 64px;
  background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 4px; }
p { margin: 4px 0 12px; max-width: 75ch; }
.quiet, figcaption { color: var(--quiet); font-size: 13px; }
.card {
  background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px;
}
.tiles { display: grid; gap: 12px; margin: 20px 0;
  grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); }
.tile .value { font-size: 28px; font-weight: 650; line-height: 1.25; white-space: nowrap; }
.tile .from { color: var(--quiet); font-size: 16px; font-weight: 400; }
.charts { display: grid; gap: 12px; margin-top: 12px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
figure { margin: 0; }
figure img { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--quiet); font-size: 13px; font-weight: 500; }
tbody th { font-weight: 400; }
tr.group th { font-weight: 650; padding-top: 14px; }
tr:last-child td, tr:last-child th { border-bottom: 0; }
.good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
.note { border-left: 4px solid var(--bad); margin: 16px 0; }
.note ul { margin: 4px 0 0; padding-left: 20px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 10px; align-items: center; font-size: 13px; }
.ramp { width: 180px; height: 14px; border-radius: 3px; border: 1px solid var(--line);
  background: linear-gradient(90deg, rgba(var(--down), .65), transparent, rgba(var(--up), .65)); }
.sample { margin-top: 10px; }
.sample .head { display: flex; flex-wrap: wrap; gap: 2px 12px; font-size: 13px; }
.sample .prompt { margin: 4px 0; }
.tokens { line-height: 2; overflow-wrap: anywhere; }
.token { padding: 2px 4px; border-radius: 3px; white-space: pre-wrap; cursor: help; }
.token.up { background: rgba(var(--up), var(--strength)); }
.token.down { background: rgba(var(--down), var(--strength));
  text-decoration: underline dotted rgba(var(--down), 1); text-underline-offset: 4px; }
details > summary { cursor: pointer; margin: 14px 0 4px; font-weight: 600; }
pre { overflow-x: auto; font: 12.5px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; margin: 0; }
@media (max-width: 480px) {
  body { padding: 16px 10px 40px; font-size: 14px; }
  th, td { padding: 5px 6px; }
}
"""
