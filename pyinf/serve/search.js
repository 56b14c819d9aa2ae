"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const root = document.documentElement;

  // Theme: follows the system until the reader chooses.
  const keep = (store, name, value) => { try { store().setItem(name, value); } catch { /* private mode */ } };
  const kept = (store, name) => { try { return store().getItem(name); } catch { return null; } };
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  if (["light", "dark"].includes(kept(() => localStorage, "pyinf-theme"))) root.dataset.theme = kept(() => localStorage, "pyinf-theme");
  $("theme").addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    keep(() => localStorage, "pyinf-theme", root.dataset.theme);
  });

  // The token stays in this tab.
  const token = $("token");
  if (token) token.value = kept(() => sessionStorage, "pyinf-token") || "";

  // Elements are built, never parsed from text: whatever a document holds, it is text.
  const make = (tag, className, ...children) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    element.append(...children);
    return element;
  };
  // Characters that move or hide others are shown by their code.
  const visible = (text) => text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]/g,
    (c) => "⟨U+" + c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0") + "⟩");
  const number = (value) => {
    if (value === 0) return "0";
    const size = Math.abs(value);
    const text = size >= 1e5 || size < 1e-3 ? size.toExponential(3) : String(+size.toPrecision(4));
    return (value < 0 ? "−" : "+") + text.replace("e+", "e").replace("e-", "e−");
  };
  const said = (value) => visible(typeof value === "string" ? value : JSON.stringify(value));

  const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + ".";

  const problem = (title, text, fields) => {
    const box = $("problem");
    box.replaceChildren(make("strong", "", title), text);
    if (fields && fields.length) {
      box.append(make("ul", "", ...fields.map((f) => make("li", "", visible(f.field) + ": " + visible(f.problem)))));
    }
    box.hidden = false;
  };

  const example = (result) => {
    const side = result.score < 0 ? "n" : "p";
    const head = make("header", "", make("span", "rank", result.rank + "."), make("span", "score", number(result.score)));
    const name = "document " + result.id + (result.position === null ? "" : ", token " + result.position);
    head.append(make("span", "chip plain", name));
    const item = make("article", "example " + side, head);
    item.setAttribute("aria-label", "Rank " + result.rank + ", " + name + ", score " + number(result.score));
    if (result.text !== null) {
      const text = make("p", "passage", visible(result.text) + (result.cut ? " …" : ""));
      text.dir = "auto";
      if (result.text.length > 1200) { text.classList.add("long"); text.tabIndex = 0; }
      item.append(text);
    } else item.append(make("p", "hint", "The store keeps no text of this document."));
    const chips = Object.entries(result.metadata).filter(([, value]) => value !== null).map(([key, value]) =>
      make("span", "chip", make("span", "", visible(key) + " "), said(value).slice(0, 200)));
    if (chips.length) item.append(make("div", "chips", ...chips));
    return make("li", "", item);
  };

  const shown = (data) => {
    const list = make("ol", "examples", ...data.results.map(example));
    const facts = [["Scores", data.exact ? "computed again, exactly" : "of the store's compressed rows"]];
    if (data.recall) {
      const r = data.recall;
      const share = (v) => (100 * v).toFixed(1) + " %";
      facts.push(["Recall@" + r.k, share(r.value) + " (" + share(r.level).replace(".0", "") + " interval " + share(r.low) + " to " + share(r.high) + ")"]);
    } else facts.push(["Recall", "not measured"]);
    facts.push(["Certificate", data.certificate === null ? "none" : data.certificate.verdict
      ? said(data.certificate.verdict) + (data.certificate.reason ? ": " + said(data.certificate.reason) : "") : said(data.certificate)]);
    facts.push(["Query", data.query.tokens + " tokens, " + data.query.counted + " of them counted"]);
    facts.push(["Time", data.timing.search.toFixed(2) + " s, and " + data.timing.waited.toFixed(2) + " s of waiting"]);
    const pairs = make("dl", "facts", ...facts.map(([k, v]) => make("div", "", make("dt", "", k), make("dd", "", v))));
    const count = data.results.length;
    const title = make("h2", "", count + (count === 1 ? " document" : " documents"),
      make("small", "", "of " + data.documents_searched.toLocaleString("en") + ", strongest first"));
    title.tabIndex = -1;
    const about = make("section", "card", make("h2", "", "How good is this answer?"), make("p", "", data.note), pairs);
    $("answer").replaceChildren(title, list, about);
    title.focus();
  };

  const query = () => {
    const asked = { k: Number($("k").value) };
    if ($("ids")) asked.input_ids = $("ids").value.split(/[\s,;[\]]+/).filter(Boolean).map(Number);
    else { asked.prompt = $("prompt").value; asked.completion = $("completion").value; }
    return asked;
  };

  let running = false;
  $("ask").addEventListener("submit", async (event) => {
    event.preventDefault();
    if (running) return;
    running = true;
    $("send").setAttribute("aria-disabled", "true");
    $("problem").hidden = true;
    $("say").textContent = "Searching …";
    const headers = { "Content-Type": "application/json" };
    if (token) { headers.Authorization = "Bearer " + token.value; keep(() => sessionStorage, "pyinf-token", token.value); }
    let spoken = "";
    try {
      const response = await fetch("search", { method: "POST", headers, body: JSON.stringify(query()) });
      const data = await response.json();
      if (response.ok) {
        shown(data);
        spoken = data.results.length + " documents found.";
      } else {
        if (response.status === 401 && token) { token.setAttribute("aria-invalid", "true"); token.focus(); }
        const later = response.headers.get("Retry-After");
        problem({ 401: "The token is not right", 422: "This cannot be asked", 503: "The service is busy" }[response.status] || "No answer",
          sentence(visible(data.error.message)) + (later ? " Try again in " + later + " s." : ""), data.error.fields);
      }
      if (token && response.status !== 401) token.removeAttribute("aria-invalid");
    } catch (error) {
      problem("No answer", "The service could not be reached, or its answer could not be read.");
    }
    $("say").textContent = spoken;
    $("send").removeAttribute("aria-disabled");
    running = false;
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.matches("textarea")) $("ask").requestSubmit();
  });
})();
