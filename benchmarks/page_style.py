"""Style sheet and script of the page, which stand in it; its security policy allows these two and no other."""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--ink:#1c2126;--dim:#59636e;--line:#d8dee4;--soft:#f4f6f8;--noise:#8b949e2e;
--c0:#0063a8;--c1:#c24e00;--c2:#007a5a;--c3:#a03f7d;--c4:#946600;--c5:#2b84c6;--c6:#4d4d4d;--c7:#6b4fb3;
--p0:#7a828b;--p1:#007a5a;--p2:#0063a8;--p3:#a03f7d;--p4:#946600;--p5:#6b4fb3;--p6:#b0b7be;--good:#00694d;--bad:#a33a00}
@media(prefers-color-scheme:dark){:root{--bg:#12161b;--ink:#e4e8ec;--dim:#9ba6b1;--line:#333b44;--soft:#1b2128;
--noise:#8b949e3d;--c0:#5cb3f0;--c1:#f5934a;--c2:#3ecfa4;--c3:#e79acb;--c4:#e6bd4c;--c5:#a5d4ff;--c6:#c9ced4;--c7:#bda5f2;
--p0:#8d96a0;--p1:#3ecfa4;--p2:#5cb3f0;--p3:#e79acb;--p4:#e6bd4c;--p5:#bda5f2;--p6:#5b646e;--good:#3ecfa4;--bad:#f5934a}}
*{box-sizing:border-box}
body{margin:0 auto;padding:20px 18px 60px;max-width:1240px;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,"DejaVu Sans",sans-serif}
h1{font-size:1rem;font-weight:600;margin:0;color:var(--dim)}
h2{font-size:1.15rem;margin:38px 0 6px}h3{font-size:.95rem;margin:16px 0 4px;overflow-wrap:anywhere}
.dim{max-width:900px}.headline{font-size:1.35rem;line-height:1.35;font-weight:600;margin:6px 0 10px;
overflow-wrap:anywhere}
p{margin:6px 0;overflow-wrap:anywhere}.dim,small{color:var(--dim)}small{font-size:.85rem}
.scroll{overflow-x:auto}section{scroll-margin-top:60px}
table{border-collapse:collapse;font-size:.82rem;font-variant-numeric:tabular-nums;width:100%}
th,td{text-align:right;padding:5px 6px;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--dim);font-weight:600;border-bottom-width:2px}
th:nth-child(-n+4),td:nth-child(-n+4){text-align:left}
td.verdict{white-space:normal;min-width:12em}td.name{max-width:20em;min-width:6em;overflow-wrap:break-word;
white-space:normal}
th.words,td.words{text-align:left;white-space:normal;min-width:11em;overflow-wrap:anywhere}
td.long{min-width:21em}
tr.out td{color:var(--dim)}tr.best td{font-weight:600}
.badge{font-weight:600;font-size:.78rem;border:1px solid currentColor;border-radius:9px;padding:0 7px;margin-right:6px;
color:var(--good);white-space:nowrap}.badge.tie{color:var(--dim)}.badge.bad{color:var(--bad)}
.dot,.box{display:inline-block;width:11px;height:11px;border-radius:50%;background:var(--k);margin-right:6px}
.box{border-radius:2px}
.toggles,.legend{display:flex;flex-wrap:wrap;gap:4px 14px;font-size:.86rem;margin:8px 0}
.toggles label{cursor:pointer;overflow-wrap:anywhere}.toggles input{accent-color:var(--k);margin:0 5px 0 0}
html:not(.js) .toggles,html:not(.js) button{display:none}
.toggles{position:sticky;top:0;background:var(--bg);padding:6px 0;border-bottom:1px solid var(--line);z-index:1}
.k0{--k:var(--c0)}.k1{--k:var(--c1)}.k2{--k:var(--c2)}.k3{--k:var(--c3)}.k4{--k:var(--c4)}.k5{--k:var(--c5)}
.k6{--k:var(--c6)}.k7{--k:var(--c7)}.twin{--k:var(--dim)}
.p0{--k:var(--p0)}.p1{--k:var(--p1)}.p2{--k:var(--p2)}.p3{--k:var(--p3)}.p4{--k:var(--p4)}.p5{--k:var(--p5)}
.p6{--k:var(--p6)}
svg{display:block;width:100%;height:auto;
font:12px system-ui,-apple-system,"Segoe UI",Roboto,Arial,"DejaVu Sans",sans-serif}
.wide svg{max-width:900px}.narrow{display:none}.narrow svg{max-width:520px}
@media(max-width:740px){.wide{display:none}.narrow{display:block}.dim{max-width:900px}.headline{font-size:1.15rem}
.toggles{position:static}}
text{fill:var(--ink)}.tick,.small{fill:var(--dim);font-size:11px}.title{fill:var(--dim)}.value{fill:var(--dim)}
.name{font-weight:500}.on-bar{fill:var(--bg);font-weight:600}.cell{text-anchor:middle;font-weight:600}
.on-light{fill:#111}.on-dark{fill:#fff}
.name,.small,.value{paint-order:stroke;stroke:var(--bg);stroke-width:3px;stroke-linejoin:round}
.grid{stroke:var(--line);stroke-width:1}.edge{stroke:var(--dim);stroke-width:1}.noise{fill:var(--noise)}
.front{fill:none;stroke:var(--ink);stroke-width:1.5;stroke-dasharray:6 4;opacity:.7}
.bubble{fill:var(--k);fill-opacity:.45;stroke:var(--k);stroke-width:2}.solid{fill:var(--k)}
.hollow{fill:var(--bg);stroke:var(--k);stroke-width:2}circle.hollow[r="4.5"]{stroke-width:1.5}
.tie-ring{fill:none;stroke:var(--k);stroke-width:1.5;stroke-dasharray:2 3}
.whisker,.interval{stroke:var(--k);stroke-width:1.5}.interval{stroke-width:3;stroke-linecap:round;opacity:.75}
.area{fill:var(--k);fill-opacity:.4;stroke:var(--k);stroke-width:1}.percentile{stroke:var(--ink);stroke-width:1.5}
.series{fill:none;stroke:var(--k);stroke-width:1.5;opacity:.8}.twin .series{stroke-dasharray:4 4}
.objective{stroke:var(--bad);stroke-width:1.5;stroke-dasharray:7 4}.bar{fill:var(--k)}
.faint{opacity:.42}.faint .hollow{fill:none;pointer-events:all}.twin .bubble{fill-opacity:.15}
.kept{stroke:var(--ink);stroke-width:2}.dropped{stroke:none}
.m:hover,.m:focus-visible{outline:2px solid var(--ink);outline-offset:1px}
#tip{position:fixed;z-index:9;pointer-events:none;max-width:min(340px,92vw);padding:6px 10px;border-radius:6px;
background:var(--ink);color:var(--bg);font-size:.84rem;line-height:1.35;overflow-wrap:anywhere}
#tip[hidden]{display:none}
details{border:1px solid var(--line);border-radius:8px;padding:6px 12px;margin:8px 0}summary{cursor:pointer;
font-weight:600;
overflow-wrap:anywhere}.finding{border-left:4px solid var(--line);background:var(--soft);padding:6px 10px;margin:6px 0;
overflow-wrap:anywhere}.finding.severe{border-color:var(--bad)}
dl{display:grid;grid-template-columns:minmax(9em,max-content) 1fr;gap:2px 16px;font-size:.86rem;margin:6px 0}
dt{color:var(--dim)}dd{margin:0;overflow-wrap:anywhere}
pre{background:var(--soft);border-radius:8px;padding:10px 12px;font-size:.82rem;line-height:1.45;overflow-x:auto}
ul.tree{list-style:none;margin:6px 0;padding:0}ul.tree ul.tree{margin-left:9px;padding-left:16px;
border-left:1px solid var(--line)}ul.tree>li{margin:8px 0;overflow-wrap:anywhere}
ul.seats{list-style:none;margin:2px 0 2px 2px;padding:0;font-size:.9rem}ul.seats>li{margin:2px 0;overflow-wrap:anywhere}
button{font:inherit;padding:6px 14px;border:1px solid var(--dim);border-radius:6px;background:var(--soft);
color:var(--ink);
cursor:pointer}
@media(max-width:480px){dl{grid-template-columns:1fr}dd{margin-bottom:6px}body{padding:14px 12px 50px}}
@media print{.toggles,button{display:none!important}pre{white-space:pre-wrap}
body{max-width:none;color-scheme:light}section{break-inside:avoid}}
"""

SCRIPT = """
(function () {
  "use strict";
  document.documentElement.classList.add("js");
  var tip = document.getElementById("tip");
  document.querySelectorAll(".m").forEach(function (mark) {
    var title = mark.querySelector("title");
    if (!title) return;
    mark.setAttribute("aria-label", title.textContent);
    title.remove();
  });
  function show(mark, x, y) {
    tip.textContent = mark.getAttribute("aria-label");
    tip.hidden = false;
    var box = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - box.width - 4)) + "px";
    tip.style.top = (y + 20 + box.height > innerHeight ? Math.max(4, y - box.height - 12) : y + 16) + "px";
  }
  function hide() { tip.hidden = true; }
  function markOf(event) { return event.target.closest ? event.target.closest(".m") : null; }
  addEventListener("pointermove", function (event) {
    var mark = markOf(event);
    if (mark) show(mark, event.clientX, event.clientY); else if (event.pointerType === "mouse") hide();
  });
  addEventListener("pointerdown", function (event) {
    var mark = markOf(event);
    if (mark) show(mark, event.clientX, event.clientY); else hide();
  });
  addEventListener("focusin", function (event) {
    var mark = markOf(event);
    if (!mark) return;
    var box = mark.getBoundingClientRect();
    show(mark, box.left + box.width / 2, box.top + box.height / 2);
  });
  addEventListener("focusout", hide);
  addEventListener("scroll", hide, { passive: true });
  addEventListener("keydown", function (event) { if (event.key === "Escape") hide(); });
  document.querySelectorAll("input[data-toggle]").forEach(function (box) {
    function apply() {
      document.querySelectorAll('svg [data-c="' + box.dataset.toggle + '"]').forEach(function (part) {
        part.style.display = box.checked ? "" : "none";
      });
    }
    box.addEventListener("change", apply);
    apply();
  });
  var button = document.getElementById("download");
  button.addEventListener("click", function () {
    var text = document.getElementById("report").textContent;
    var link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = button.dataset.file;
    link.click();
    setTimeout(function () { URL.revokeObjectURL(link.href); }, 1000);
  });
  var told = JSON.parse(document.getElementById("report").textContent);
  document.body.dataset.ready = (told.candidates || told.tried).length;
})();
"""
