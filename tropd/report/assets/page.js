"use strict";
// The page itself: unpacking, colours, the table of runs, the way through the sections.

const byId = (id) => document.getElementById(id);
const Data = JSON.parse(byId("data").textContent);

// Everything that comes from a run enters the page as text.
function make(tag, attributes = {}, ...children) {
  const made = tag.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4))
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

async function gunzip(packed) {
  if (!("DecompressionStream" in window)) throw new Error("This browser cannot unpack the page. One of 2023 or later can.");
  const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

const unpack = (id) => gunzip(byId(id).textContent);

const Library = {
  waiting: null,
  load() {
    this.waiting ??= unpack("plotly").then((source) => {
      document.head.append(make("script", {}, source));
      return window.Plotly;
    });
    return this.waiting;
  },
};

const FORMATS = {
  share: (x) => `${(100 * x).toPrecision(3).replace(/\.?0+$/, "")} %`,
  seconds: (x) => `${Number(x.toPrecision(3))} s`,
  tokens: (x) => (Math.abs(x) >= 100 ? Math.round(x).toLocaleString("en") : String(Number(x.toPrecision(3)))),
};

function say(x, format) {
  if (x === null || x === undefined) return "–";
  if (x === 0) return format === "share" ? "0 %" : "0";
  return FORMATS[format] ? FORMATS[format](x) : String(Number(x.toPrecision(4)));
}

// ---------------------------------------------------------------------------------------------------------- colours
const Theme = {
  choices: ["auto", "light", "dark"],
  dark: window.matchMedia("(prefers-color-scheme: dark)"),
  choice: "auto",
  listeners: [],
  start() {
    try {
      this.choice = localStorage.getItem("tropd-theme") ?? "auto";
    } catch {
      this.choice = "auto"; // a page from a file may have no storage
    }
    if (!this.choices.includes(this.choice)) this.choice = "auto";
    this.apply();
    this.dark.addEventListener("change", () => this.apply());
    byId("theme").addEventListener("click", () => {
      this.choice = this.choices[(this.choices.indexOf(this.choice) + 1) % 3];
      try {
        localStorage.setItem("tropd-theme", this.choice);
      } catch {
        // then it lasts as long as the page
      }
      this.apply();
    });
  },
  apply(forced = null) {
    const shown = forced ?? (this.choice === "auto" ? (this.dark.matches ? "dark" : "light") : this.choice);
    document.documentElement.dataset.theme = shown;
    const words = { auto: "as the system", light: "light", dark: "dark" };
    byId("theme").textContent = { auto: "◐ Auto", light: "○ Light", dark: "● Dark" }[this.choice];
    byId("theme").setAttribute("aria-label", `Colours: ${words[this.choice]}`);
    for (const listener of this.listeners) listener();
  },
  colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  },
};

// ------------------------------------------------------------------------------------------------ the table of runs
function sortTable(button) {
  const head = button.closest("th");
  const body = button.closest("table").tBodies[0];
  const column = Number(button.dataset.sort);
  const rising = head.getAttribute("aria-sort") === "descending" || (column < 2 && head.getAttribute("aria-sort") === "none");
  for (const other of head.parentElement.children) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", rising ? "ascending" : "descending");
  const key = (row) => JSON.parse(row.dataset.sort)[column];
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === "" || y === "") return (x === "") - (y === ""); // what is not known comes last either way
    const order = typeof x === "number" ? x - y : String(x).localeCompare(String(y));
    return rising ? order : -order;
  });
  body.append(...rows);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("thead button[data-sort]");
  if (button) sortTable(button);
});

// ------------------------------------------------------------------------------------------ where the reader is
function watchSections() {
  const links = new Map([...document.querySelectorAll(".bar nav a")].map((a) => [a.hash.slice(1), a]));
  const seen = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) if (entry.isIntersecting) mark(entry.target.id);
    },
    { rootMargin: "-15% 0px -75% 0px" },
  );
  function mark(id) {
    for (const [name, link] of links) {
      if (name === id) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
  }
  function observe() {
    seen.disconnect();
    for (const [id, link] of links) {
      const section = byId(id);
      link.hidden = section === null;
      if (section) seen.observe(section);
    }
  }
  observe();
  return observe;
}

Theme.start();
const observeSections = watchSections();
