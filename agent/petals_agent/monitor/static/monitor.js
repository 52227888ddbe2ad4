// Makes the page live: the server sends the same HTML that works without this, and changes are merged into what is
// there, so that scroll, focus, open rows, order and filter stay. Texts of strangers are only ever copied as text nodes.
"use strict";

const root = document.documentElement;
const body = document.body;
const announcer = document.getElementById("announcer");
root.classList.add("with-script");

// --- merging

const OURS = new Set(["aria-expanded", "aria-controls", "role", "data-own", "data-wanted"]); // attributes that only this script sets
const MOVED = ["href", "action", "data-source", "data-history", "src"];

function sameKind(one, other) {
  return one.nodeType === other.nodeType && one.nodeName === other.nodeName && (one.id || "") === (other.id || "");
}

function mergeAttributes(old, fresh) {
  for (const { name, value } of [...fresh.attributes]) {
    if (old.getAttribute(name) !== value && !OURS.has(name)) old.setAttribute(name, value);
  }
  for (const { name } of [...old.attributes]) {
    if (!fresh.hasAttribute(name) && !OURS.has(name)) old.removeAttribute(name);
  }
}

// Makes `old` like `fresh`. Tables that are loaded by themselves stay as they are, but for `region`.
function merge(old, fresh, region = null) {
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.nodeValue !== fresh.nodeValue) old.nodeValue = fresh.nodeValue;
    return;
  }
  if (old.hasAttribute("data-own") && old !== region) return;
  mergeAttributes(old, fresh);
  if (old.classList.contains("readout")) return;
  const named = new Map([...old.children].filter((child) => child.id).map((child) => [child.id, child]));
  let place = old.firstChild;
  for (const wanted of [...fresh.childNodes]) {
    while (place && place.isOurs) place = place.nextSibling;
    const known = wanted.id ? named.get(wanted.id) : place && sameKind(place, wanted) ? place : null;
    if (!known) {
      old.insertBefore(document.importNode(wanted, true), place);
    } else {
      if (known === place) place = place.nextSibling;
      else old.insertBefore(known, place);
      merge(known, wanted, region);
    }
  }
  while (place) {
    const next = place.nextSibling;
    if (!place.isOurs) place.remove();
    place = next;
  }
}

// Runs `change`, then gives the focus back to what had it, if it is still there.
function keepingFocus(change) {
  const focused = document.activeElement;
  const id = focused && focused.id;
  change();
  if (focused && focused !== body && document.activeElement !== focused) {
    const now = focused.isConnected ? focused : id && document.getElementById(id);
    if (now) now.focus({ preventScroll: true });
  }
}

async function fetchPage(address) {
  const answer = await fetch(address, { headers: { Accept: "text/html" }, signal: AbortSignal.timeout(15000) });
  const kind = answer.headers.get("Content-Type") || "";
  if (!kind.startsWith("text/html") || answer.status === 429) throw new Error(`${answer.status}`);
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const name of MOVED) {
    for (const element of page.querySelectorAll(`[${name}]`)) {
      const value = element.getAttribute(name);
      if (!value.startsWith("#")) element.setAttribute(name, new URL(value, answer.url).href);
    }
  }
  return page;
}

// --- what the whole page shows

let refreshing = false;
let refreshedAt = 0; // performance.now()
let again = false;

async function refresh() {
  if (refreshing) {
    again = true;
    return;
  }
  refreshing = true;
  refreshedAt = performance.now();
  try {
    const before = tally();
    const page = await fetchPage(location.href.split("#")[0]);
    keepingFocus(() => {
      merge(document.getElementById("main"), page.getElementById("main"));
      merge(document.getElementById("age"), page.getElementById("age"));
      mergeAttributes(body, page.body);
      document.title = page.title;
      enhance();
      tick();
    });
    for (const region of document.querySelectorAll(".servers[data-own]")) await load(region, region.dataset.wanted);
    for (const row of document.querySelectorAll("tr.opened")) await fill(row);
    if (tally() && tally() !== before) announce(tally());
  } catch (error) {
    console.info("not refreshed:", error.message); // the next event tries anew
  } finally {
    refreshing = false;
  }
  if (again) {
    again = false;
    await refresh();
  }
}

function tally() {
  const parts = [...document.querySelectorAll("#tally li:not(.none)")].map((item) => item.textContent.trim());
  return parts.length ? `Models: ${parts.join(", ").replace(/\s+/g, " ")}` : "";
}

function announce(text) {
  announcer.textContent = text;
}

// --- one table: order, filter, pages

async function load(region, address, told = false) {
  region.dataset.own = "";
  region.dataset.wanted = address;
  const page = await fetchPage(address);
  const fresh = page.getElementById(region.id);
  if (region.dataset.wanted !== address || !fresh) return; // a newer wish, or the model is gone
  keepingFocus(() => {
    merge(region, fresh, region);
    enhance();
  });
  if (body.dataset.base === "../") history.replaceState(null, "", address);
  if (told) announce(region.querySelector(".matching").textContent);
}

function asked(form) {
  const query = new URLSearchParams(new FormData(form));
  for (const [name, value] of [...query]) if (!value) query.delete(name);
  const address = new URL(form.action);
  address.search = query;
  return address.href;
}

function search(form) {
  const region = form.closest(".servers");
  load(region, asked(form), true).catch(() => form.submit());
}

let typing = 0;
document.addEventListener("input", (event) => {
  const form = event.target.closest("form.find");
  if (!form) return;
  clearTimeout(typing);
  typing = setTimeout(search, event.target.type === "search" ? 180 : 0, form);
});
document.addEventListener("submit", (event) => {
  const form = event.target.closest("form.find");
  if (!form) return;
  event.preventDefault();
  clearTimeout(typing);
  search(form);
});

// --- one server

function toggle(link) {
  const row = link.closest("tr");
  const open = document.getElementById(`more-${row.id}`);
  if (open) {
    open.remove();
    link.setAttribute("aria-expanded", "false");
    return;
  }
  const more = document.createElement("tr");
  more.className = "opened";
  more.id = `more-${row.id}`;
  more.isOurs = true;
  more.dataset.of = row.id;
  const cell = more.appendChild(document.createElement("td"));
  cell.colSpan = columns(row);
  cell.textContent = "…";
  row.after(more);
  link.setAttribute("aria-expanded", "true");
  link.setAttribute("aria-controls", more.id);
  fill(more).catch(() => location.assign(link.href));
}

async function fill(more) {
  const row = document.getElementById(more.dataset.of);
  if (!row) return;
  const page = await fetchPage(row.querySelector("a.peer").href);
  const details = page.getElementById("details");
  const cell = more.firstChild;
  const wanted = document.createElement("td");
  wanted.colSpan = cell.colSpan;
  if (details) {
    details.removeAttribute("id");
    wanted.append(document.importNode(details, true));
  } else {
    wanted.textContent = "This server is no longer in the swarm.";
  }
  merge(cell, wanted);
}

// As many as are shown: a phone has fewer.
function columns(row) {
  return [...row.children].filter((cell) => cell.checkVisibility()).length;
}

// After the table changed: rows for details follow their server, or go with it.
function enhance() {
  for (const link of document.querySelectorAll("a.peer:not([aria-expanded])")) {
    link.setAttribute("aria-expanded", "false");
    link.setAttribute("role", "button");
  }
  for (const more of document.querySelectorAll("tr.opened")) {
    const row = document.getElementById(more.dataset.of);
    if (!row) more.remove();
    else if (row.nextSibling !== more) row.after(more);
    if (row) more.firstChild.colSpan = columns(row);
  }
  for (const link of document.querySelectorAll('a.peer[aria-expanded="true"]')) {
    if (!document.getElementById(link.getAttribute("aria-controls"))) link.setAttribute("aria-expanded", "false");
  }
}

document.addEventListener("click", (event) => {
  if (event.defaultPrevented || event.button || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
  const link = event.target.closest("a");
  if (!link) return;
  if (link.matches("a.peer")) {
    event.preventDefault();
    toggle(link);
  } else if (link.dataset.inPlace !== undefined) {
    event.preventDefault();
    load(link.closest(".servers"), link.href.split("#")[0], true).catch(() => location.assign(link.href));
  }
});

document.addEventListener("keydown", (event) => {
  const typingIn = event.target.closest("input, select, textarea");
  if (event.key === " " && event.target.matches("a.peer")) {
    event.preventDefault();
    toggle(event.target);
  } else if (event.key === "/" && !typingIn && !event.ctrlKey && !event.metaKey) {
    const field = document.querySelector('.find input[type="search"]');
    if (field) {
      event.preventDefault();
      field.focus();
    }
  }
});

// --- what lies under the pointer

const number = new Intl.NumberFormat("en");
const clock = new Intl.DateTimeFormat("en", { hour: "2-digit", minute: "2-digit", hour12: false });
const day = new Intl.DateTimeFormat("en", { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", hour12: false });
const pasts = new Map();

function readBlock(figure, part) {
  const online = figure.dataset.online.split(",");
  const block = Math.min(online.length - 1, Math.floor(part * online.length));
  const joining = Number(figure.dataset.joining.split(",")[block]);
  const rate = number.format(figure.dataset.rates.split(",")[block]);
  return `block ${block}: ${online[block]} online${joining ? `, ${joining} joining` : ""}, ${rate} tokens/s`;
}

function readPast(figure, part) {
  const plots = figure.closest(".plots");
  const address = plots.dataset.history;
  if (!pasts.has(address)) {
    pasts.set(address, null);
    fetch(address).then((answer) => answer.json()).then((past) => pasts.set(address, past)).catch(() => null); // not before the next state
  }
  const past = pasts.get(address);
  if (!past?.points?.length) return "";
  const at = past.since + part * (past.until - past.since);
  const point = past.points.reduce((best, one) => (Math.abs(one.at - at) < Math.abs(best.at - at) ? one : best));
  const when = (past.until - past.since > 90000 ? day : clock).format(new Date(point.at * 1000));
  const blocks = Number(plots.dataset.blocks);
  return figure.dataset.of === "covered"
    ? `${when} · ${blocks - point.uncovered} of ${blocks}`
    : `${when} · ${number.format(Math.round(point.weakest * 10) / 10)}, mean ${number.format(Math.round(point.mean * 10) / 10)}`;
}

document.addEventListener("pointermove", (event) => {
  const drawing = event.target.closest(".cover, .plot");
  if (!drawing) return;
  const figure = drawing.closest("figure");
  const box = drawing.getBoundingClientRect();
  const part = Math.min(0.999999, Math.max(0, (event.clientX - box.left) / box.width));
  figure.querySelector(".readout").textContent = drawing.matches(".cover") ? readBlock(figure, part) : readPast(figure, part);
});
document.addEventListener("pointerout", (event) => {
  const figure = event.target.closest && event.target.closest("figure");
  if (figure && !figure.contains(event.relatedTarget)) figure.querySelector(".readout").textContent = "";
});

// --- age, and news from the server

let ahead = 0; // of the server's clock before ours, in seconds
let connected = false;

function spell(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} days`;
}

function tick() {
  const taken = document.getElementById("taken");
  const age = document.getElementById("age");
  const at = Number(body.dataset.takenAt);
  const period = Number(body.dataset.period);
  const old = at ? Math.max(0, Date.now() / 1000 + ahead - at) : Infinity;
  if (taken && at) {
    const text = `${spell(old)} ago`;
    if (taken.textContent !== text) taken.textContent = text;
    taken.title = new Date(at * 1000).toLocaleString();
    root.classList.toggle("late", old > 2 * period + 60 || Boolean(document.getElementById("stale")));
  }
  root.classList.toggle("live", connected && !root.classList.contains("late"));
  if (old > 1.5 * period && performance.now() - refreshedAt > 1000 * Math.max(period, 3)) refresh(); // no news, so ask
  age.title = connected ? "Updates by itself" : "Not connected; trying again";
}

let events = null;
let refusals = 0; // in a row

function listen() {
  events = new EventSource(`${body.dataset.base}events`);
  events.addEventListener("open", () => {
    connected = true;
    refusals = 0;
    tick();
  });
  events.addEventListener("error", () => {
    connected = false;
    tick();
    if (events.readyState === EventSource.CLOSED) setTimeout(listen, Math.min(60000, 2000 * 2 ** refusals++) * (1 + Math.random() / 2)); // refused, not lost
  });
  events.addEventListener("state", (event) => {
    const news = JSON.parse(event.data);
    ahead = news.now - Date.now() / 1000;
    pasts.clear();
    const shown = Number(body.dataset.takenAt) === news.taken_at && Boolean(document.getElementById("stale")) === news.stale;
    if (!shown) setTimeout(refresh, Math.random() * 300); // not all readers at once
  });
}

listen();
addEventListener("pagehide", () => events.close());
addEventListener("pageshow", (event) => event.persisted && location.reload());

matchMedia("(max-width: 760px)").addEventListener("change", enhance);
enhance();
tick();
setInterval(tick, 1000);
