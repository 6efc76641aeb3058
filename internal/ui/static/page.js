// Keeps the parts of a page that have data-live current: the server says that
// something may have changed, and the page is read again.
"use strict";
(() => {
  const live = document.getElementById("live");
  const say = (text) => { live.firstChild.textContent = text; };
  const key = (el) => el.id || el.getAttribute("href") || (el.name ? el.name + "=" + el.value : el.tagName + el.textContent);
  // What a person is doing stays: ticks, open details, the focus.
  const swap = (old, now) => {
    const selection = document.getSelection();
    const typing = old.contains(document.activeElement) && document.activeElement.matches("input:not([type=checkbox]), select, textarea");
    if (typing || (selection && !selection.isCollapsed && old.contains(selection.anchorNode))) return;
    const ticked = new Set([...old.querySelectorAll("input[type=checkbox]:checked")].map(key));
    const typed = new Map([...old.querySelectorAll("input[type=text], input:not([type]), select")].map((el) => [el.name, el.value]));
    const opened = new Set([...old.querySelectorAll("details[open]")].map((el) => el.querySelector("summary").textContent + [...old.querySelectorAll("details")].indexOf(el)));
    const focus = old.contains(document.activeElement) ? key(document.activeElement) : null;
    const scrolled = [...old.querySelectorAll(".scroll")].map((el) => el.scrollLeft);
    for (const name of ["class", "hidden"]) now.hasAttribute(name) ? old.setAttribute(name, now.getAttribute(name)) : old.removeAttribute(name);
    old.replaceChildren(...now.childNodes);
    old.querySelectorAll("input[type=checkbox]").forEach((el) => { if (ticked.has(key(el))) el.checked = true; });
    old.querySelectorAll("input[type=text], input:not([type]), select").forEach((el) => { if (typed.has(el.name) && !el.closest("td")) el.value = typed.get(el.name); });
    [...old.querySelectorAll("details")].forEach((el, i) => { if (opened.has(el.querySelector("summary").textContent + i)) el.open = true; });
    old.querySelectorAll(".scroll").forEach((el, i) => { el.scrollLeft = scrolled[i] || 0; });
    if (focus !== null) [...old.querySelectorAll("a, button, input, summary, [tabindex]")].find((el) => key(el) === focus)?.focus({ preventScroll: true });
  };
  let busy = false, again = false;
  const refresh = async () => {
    if (busy || document.hidden) { again = true; return; }
    busy = true; again = false;
    const began = performance.now();
    try {
      const answer = await fetch(location.href, { cache: "no-store", redirect: "error" });
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const parts = [...document.querySelectorAll("[data-live]")];
      if (parts.every((old) => page.getElementById(old.id)) && (answer.ok || document.getElementById("problem"))) {
        parts.forEach((old) => { const now = page.getElementById(old.id); if (old.innerHTML !== now.innerHTML) swap(old, now); });
        say("Kept current, last at " + new Date().toISOString().slice(11, 19) + " UTC. ");
      } else if (answer.ok) {
        location.reload(); // another page stands here now
      } else say("Not current since " + new Date().toISOString().slice(11, 19) + " UTC. ");
    } catch { say("Not current: the page can't be reached. "); }
    // A page that takes long to make is asked for less often.
    setTimeout(() => { busy = false; if (again) refresh(); }, 3 * (performance.now() - began));
  };
  if (live?.dataset.on !== "yes" || !window.EventSource) return;
  const source = new EventSource("/events");
  source.onmessage = refresh;
  source.onerror = () => say("Not current: connecting again. ");
  document.addEventListener("visibilitychange", () => { if (!document.hidden && again) refresh(); });
  addEventListener("pagehide", () => source.close());
})();
