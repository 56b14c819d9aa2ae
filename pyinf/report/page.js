"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const root = document.documentElement;
  const articles = [...document.querySelectorAll("article.query")];
  const items = [...document.querySelectorAll("#list li")];

  // Theme: follows the system until the reader chooses; the choice is kept where the browser allows it.
  const memory = { get: () => { try { return localStorage.getItem("pyinf-theme"); } catch { return null; } },
                   set: (v) => { try { localStorage.setItem("pyinf-theme", v); } catch { /* private mode */ } } };
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  if (["light", "dark"].includes(memory.get())) root.dataset.theme = memory.get();
  $("theme").addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    memory.set(root.dataset.theme);
    $("say").textContent = root.dataset.theme + " theme";
  });

  // One query at a time, addressed by the fragment, so that links and the back button work.
  let current = 0;
  const show = (index, focus) => {
    current = index;
    articles.forEach((a, i) => { a.hidden = i !== index; });
    items.forEach((li, i) => {
      const link = li.firstElementChild;
      if (i === index) { link.setAttribute("aria-current", "true"); link.scrollIntoView({ block: "nearest" }); }
      else link.removeAttribute("aria-current");
    });
    if (focus) { const title = $("h-" + index); title.focus({ preventScroll: true }); articles[index].scrollIntoView(); }
  };
  const fromHash = (focus) => {
    const found = /^#q-(\d+)$/.exec(location.hash);
    if (found && articles[+found[1]]) show(+found[1], focus);
    else if (!focus && articles.length) { show(0, false); scrollTo(0, 0); }
  };
  addEventListener("hashchange", () => fromHash(true));
  fromHash(false);
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-step]");
    if (!button) return;
    const open = items.map((li, i) => i).filter((i) => !items[i].hidden);
    const among = open.length ? open : items.map((_, i) => i);
    const at = among.indexOf(current);
    const next = among[(Math.max(at, 0) + +button.dataset.step + among.length) % among.length];
    location.hash = "q-" + next;
  });

  // Filter: every word must occur.
  $("find").addEventListener("input", (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const li of items) {
      li.hidden = !words.every((w) => li.dataset.find.includes(w));
      count += !li.hidden;
    }
    $("found").textContent = words.length ? count + " of " + items.length : String(items.length);
  });
  $("find").addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    const first = items.findIndex((li) => !li.hidden);
    if (first >= 0) location.hash = "q-" + first;
  });

  // A token's number: by mouse, by touch, by arrow keys.
  const tip = $("tip");
  let here = null;
  const point = (token) => {
    if (here) here.classList.remove("here");
    here = token;
    tip.hidden = !token;
    if (!token) return;
    token.classList.add("here");
    tip.textContent = token.dataset.v;
    const box = token.getClientRects()[0] || token.getBoundingClientRect();
    const left = Math.min(Math.max(4, box.left + box.width / 2 - tip.offsetWidth / 2), root.clientWidth - tip.offsetWidth - 4);
    const above = box.top - tip.offsetHeight - 5;
    tip.style.transform = "translate(" + left + "px," + (above > 2 ? above : box.bottom + 5) + "px)";
  };
  document.addEventListener("pointerover", (event) => point(event.target.closest(".passage [data-v]")));
  document.addEventListener("pointerdown", (event) => point(event.target.closest(".passage [data-v]")));
  addEventListener("scroll", () => { if (here && !here.parentElement.matches(":focus")) point(null); }, { passive: true, capture: true });
  document.addEventListener("keydown", (event) => {
    const passage = event.target.closest && event.target.closest(".passage[tabindex]");
    if (event.key === "Escape") { point(null); return; }
    if (!passage || !["ArrowLeft", "ArrowRight", "Home", "End"].includes(event.key)) return;
    event.preventDefault();
    const tokens = [...passage.querySelectorAll("[data-v]")];
    const at = tokens.indexOf(here);
    const next = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: tokens.length - 1 }[event.key];
    const token = tokens[Math.min(Math.max(next, 0), tokens.length - 1)];
    if (!token) return;
    token.scrollIntoView({ block: "nearest" });
    point(token);
    $("say").textContent = token.textContent + " " + token.dataset.v;
  });
  document.addEventListener("focusout", () => point(null));

  // The data of the page.
  const json = () => JSON.stringify(JSON.parse($("data").textContent), null, 1);
  const said = (text) => { $("copied").textContent = text; setTimeout(() => { $("copied").textContent = ""; }, 2500); };
  $("copy").addEventListener("click", async () => {
    try { await navigator.clipboard.writeText(json()); said("Copied"); return; } catch { /* the old way follows */ }
    const area = document.createElement("textarea");
    area.value = json();
    document.body.append(area);
    area.select();
    said(document.execCommand("copy") ? "Copied" : "The browser does not allow copying; use Save.");
    area.remove();
    $("copy").focus();
  });
  $("save").addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([json()], { type: "application/json" }));
    link.download = "report.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
  $("raw").addEventListener("toggle", () => {
    const pre = $("raw").querySelector("pre");
    if ($("raw").open && !pre.textContent) pre.textContent = json();
  });
})();
