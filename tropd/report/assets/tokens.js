// One transcript, token by token, and the card that says what both models thought of a token.

const KNOWN_FATES = { "": "f-none", trusted: "f-trusted", outlier: "f-outlier", guidance: "f-guided" };
const SPARE_FATES = ["f-extra", "f-other"];
const LIKELY_FATES = ["f-trusted", "f-outlier", "f-extra", "f-other"];

// How a fate looks: those of TrOPD always the same; other methods' terms take the looks that are free, in order.
function fateClass(fate) {
  if (fate in KNOWN_FATES) return KNOWN_FATES[fate];
  const trusting = Shelf.fates.some((name) => name in KNOWN_FATES && name !== "");
  const others = Shelf.fates.filter((name) => !(name in KNOWN_FATES));
  const looks = trusting ? SPARE_FATES : LIKELY_FATES;
  return looks[Math.min(others.indexOf(fate), looks.length - 1)];
}

const visible = (text) => (text === "" ? "·" : text.replaceAll("\n", "⏎\n").replaceAll("\t", "⇥\t"));
const bare = (text) => visible(text).replaceAll("\n", "").replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length));
const logprob = (x) => (x === null ? null : typeof x === "string" ? (x === "inf" ? Infinity : -Infinity) : x / 1000);

function gapOf(one, t) {
  const [s, x] = [logprob(one.student[t]), logprob(one.teacher[t])];
  return s === null || x === null ? null : x - s;
}

const Reader = {
  one: null,
  text: "",
  now: 0,
  pinned: false,

  start() {
    const answer = byId("answer");
    const tokenAt = (event) => event.target.closest?.("#answer .t") ?? null;
    answer.addEventListener("mouseover", (event) => {
      if (tokenAt(event) && !this.pinned) Card.open(tokenAt(event), this.one);
    });
    answer.addEventListener("mouseout", (event) => {
      if (!this.pinned && !byId("card").contains(event.relatedTarget) && !answer.contains(event.relatedTarget)) Card.close();
    });
    byId("card").addEventListener("mouseleave", () => {
      if (!this.pinned && !answer.contains(document.activeElement)) Card.close();
    });
    answer.addEventListener("click", (event) => {
      if (tokenAt(event)) this.go(Number(tokenAt(event).dataset.t), true);
    });
    answer.addEventListener("focusin", (event) => {
      if (tokenAt(event)) this.tell(tokenAt(event));
    });
    answer.addEventListener("focusout", (event) => {
      if (!answer.contains(event.relatedTarget)) this.release();
    });
    answer.addEventListener("keydown", (event) => this.onKey(event));
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.release();
    });
    byId("colour-by").addEventListener("change", () => this.draw());
    byId("next-gap").addEventListener("click", () => this.nextGap());
    byId("next-fate").addEventListener("click", () => this.nextFate());
  },

  open(one, text) {
    if (this.one === one && this.text === text) return;
    const held = this.one?.key === one.key && byId("answer").contains(document.activeElement);
    if (this.one?.key !== one.key) {
      this.now = 0;
      this.release();
    }
    this.one = one;
    this.text = text;
    const run = Data.runs.length > 1 ? `${Data.runs[one.run].name}, ` : "";
    byId("transcript-title").textContent = `${run}step ${one.step}`;
    const facts = [`prompt ${one.prompt_id}`, `${one.ids.length} tokens`, `ended by ${FINISHES[one.finish] ?? one.finish}`];
    if (one.reward !== null) facts.unshift(`reward ${say(one.reward)}`);
    byId("transcript-facts").textContent = facts.join(" · ");
    byId("prompt").textContent = one.prompt;
    this.draw();
    if (held) this.tokens[this.now]?.focus({ preventScroll: true });
  },

  draw() {
    const { one } = this;
    if (!one) return;
    const byGap = byId("colour-by").value === "gap";
    const hits = hitTokens(one, this.text);
    this.tokens = one.texts.map((text, t) => {
      const look = byGap ? gapLook(gapOf(one, t)) : { class: fateClass(Shelf.fates[one.fates[t]]) };
      const author = AUTHORS[one.authors[t]] ?? "";
      const classes = ["t", look.class, author, hits.has(t) ? "hit" : ""].filter(Boolean).join(" ");
      const token = make("span", { class: classes, "data-t": t, tabindex: t === this.now ? 0 : -1, style: look.style ?? null });
      for (const part of visible(text).split(/(⏎|⇥)/)) {
        if (part === "⏎" || part === "⇥") token.append(make("span", { class: "mark-space", "aria-hidden": "true" }, part));
        else token.append(part);
      }
      return token;
    });
    if (one.response !== null) byId("answer").replaceChildren(make("p", {}, one.response), make("p", { class: "small" }, "This file keeps no text of single tokens; their numbers follow."), ...this.tokens);
    else byId("answer").replaceChildren(...this.tokens);
    if (!this.tokens.length) byId("answer").replaceChildren(make("p", { class: "note" }, "The answer has no tokens."));
    this.drawLegend(byGap);
  },

  drawLegend(byGap) {
    const { one } = this;
    const entry = (look, label) => make("span", {}, make("span", { class: `t ${look.class}`, style: look.style ?? null }, "token"), label);
    let entries;
    if (byGap) {
      entries = [[-6, "teacher finds it much less likely"], [-1.5, "less likely"], [0, "alike"], [1.5, "more likely"]].map(([x, label]) => entry(gapLook(x), label));
    } else {
      const counts = new Map();
      for (const f of one.fates) counts.set(f, (counts.get(f) ?? 0) + 1);
      entries = [...counts].sort((a, b) => b[1] - a[1]).map(([f, n]) => entry({ class: fateClass(Shelf.fates[f]) }, `${fateName(Shelf.fates[f])} (${n})`));
    }
    if (one.authors.includes("t")) entries.push(entry({ class: "teacher" }, "slanted: written by the teacher"));
    byId("token-legend").replaceChildren(...entries);
  },

  go(t, pin = false) {
    if (!this.tokens?.length) return;
    this.tokens[this.now]?.setAttribute("tabindex", "-1");
    this.now = Math.min(Math.max(t, 0), this.tokens.length - 1);
    const token = this.tokens[this.now];
    token.setAttribute("tabindex", "0");
    this.pinned = false;
    token.focus();
    this.pinned = pin;
  },

  tell(token) {
    const t = Number(token.dataset.t);
    for (const other of this.tokens) if (other.hasAttribute("role")) ["role", "aria-describedby"].forEach((name) => other.removeAttribute(name));
    token.setAttribute("role", "button");
    token.setAttribute("aria-describedby", "card");
    Card.open(token, this.one);
    byId("spoken").textContent = spoken(this.one, t);
  },

  release() {
    this.pinned = false;
    Card.close();
  },

  onKey(event) {
    const moves = { ArrowRight: this.now + 1, ArrowDown: this.now + 1, ArrowLeft: this.now - 1, ArrowUp: this.now - 1, Home: 0, End: Infinity };
    if (event.key in moves) {
      event.preventDefault();
      this.go(moves[event.key]);
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.pinned = !this.pinned;
      if (this.pinned) Card.open(this.tokens[this.now], this.one);
      else Card.close();
    }
  },

  // From the largest gap to the next smaller one, and round again.
  nextGap() {
    const size = (t) => Math.abs(gapOf(this.one, t) ?? -1);
    const order = this.one.ids.map((_, t) => t).filter((t) => gapOf(this.one, t) !== null).sort((a, b) => size(b) - size(a) || a - b);
    if (!order.length) return;
    const shown = byId("card").hidden ? -1 : order.indexOf(this.now);
    this.go(order[(shown + 1) % order.length], true);
  },

  nextFate() {
    const { fates } = this.one;
    for (let step = 1; step <= fates.length; step += 1) {
      const t = (this.now + step) % fates.length;
      if (t > 0 && fates[t] !== fates[t - 1]) return this.go(t, true);
    }
  },
};

function hitTokens(one, text) {
  const hits = new Set();
  if (text === "") return hits;
  const whole = one.texts.join("").toLowerCase();
  const starts = [];
  let reached = 0;
  for (const piece of one.texts) {
    starts.push(reached);
    reached += piece.length;
  }
  for (let at = whole.indexOf(text); at >= 0; at = whole.indexOf(text, at + 1)) {
    starts.forEach((start, t) => {
      if (start < at + text.length && start + one.texts[t].length > at) hits.add(t);
    });
  }
  return hits;
}

// Colour by gap: the further, the stronger; the line under it says which way without colour.
function gapLook(x) {
  if (x === null) return { class: "f-none" };
  const strength = Math.round(Math.min(Math.abs(x) / 6, 1) * 55);
  const colour = `color-mix(in srgb, var(--${x < 0 ? "less" : "more"}) ${strength}%, transparent)`;
  const line = Math.abs(x) < 1 ? "g" : x < 0 ? "g-minus" : "g-plus";
  return { class: line, style: `background: ${colour}` };
}

const percent = (x) => (x === null ? "not known" : x === -Infinity ? "0" : Math.exp(x) < 0.0001 ? Math.exp(x).toExponential(1) : `${Number((100 * Math.exp(x)).toPrecision(3))} %`);

function spoken(one, t) {
  const [s, x] = [logprob(one.student[t]), logprob(one.teacher[t])];
  const top = one.tops[t] ? `; the teacher's first choice is ${Shelf.words[one.tops[t][0]]}` : "";
  return `${one.texts[t]}: ${fateName(Shelf.fates[one.fates[t]])}, written by the ${AUTHORS[one.authors[t]]}, student ${percent(s)}, teacher ${percent(x)}${top}`;
}

const Card = {
  open(token, one) {
    const t = Number(token.dataset.t);
    const card = byId("card");
    for (const other of document.querySelectorAll(".t.now")) other.classList.remove("now");
    token.classList.add("now");
    card.replaceChildren(...this.contents(one, t));
    card.hidden = false;
    const at = token.getClientRects()[0] ?? token.getBoundingClientRect();
    const left = Math.min(Math.max(at.left, 8), document.documentElement.clientWidth - card.offsetWidth - 8);
    const below = at.bottom + 8 + card.offsetHeight < window.innerHeight || at.top < card.offsetHeight + 70;
    card.style.left = `${left + window.scrollX}px`;
    card.style.top = `${(below ? at.bottom + 8 : at.top - card.offsetHeight - 8) + window.scrollY}px`;
  },

  close() {
    byId("card").hidden = true;
    for (const other of document.querySelectorAll(".t.now")) other.classList.remove("now");
  },

  contents(one, t) {
    const [s, x, gap] = [logprob(one.student[t]), logprob(one.teacher[t]), gapOf(one, t)];
    const row = (label, value, kind, written = false) => {
      const meter = make("span", { class: `meter ${kind}`, style: `width: ${value === null ? 0 : Math.max(100 * Math.exp(value), 0.5)}%` });
      const name = make("th", { scope: "row" });
      name.append(label);
      return make("tr", written ? { class: "written" } : {}, name, make("td", { class: "n" }, percent(value)), make("td", {}, meter));
    };
    const parts = [
      make("div", { class: "word" }, bare(one.texts[t])),
      make("p", {}, `${fateName(Shelf.fates[one.fates[t]])} · by the ${AUTHORS[one.authors[t]] ?? "context"} · token ${one.ids[t]}, place ${t + 1}`),
      make("table", {}, make("tbody", {}, row("Student", s, "student"), row("Teacher", x, "teacher"))),
    ];
    if (gap !== null) parts.push(make("p", {}, gapWords(gap)));
    const top = one.tops[t];
    parts.push(make("h5", {}, top ? "The teacher would rather have written" : "The teacher's alternatives were not asked for here."));
    if (top) {
      const rows = [];
      for (let i = 0; i < top.length; i += 2) {
        const word = Shelf.words[top[i]];
        const label = make("code", {}, bare(word));
        rows.push(row(label, logprob(top[i + 1]), "teacher", word === one.texts[t]));
      }
      parts.push(make("table", {}, make("tbody", {}, ...rows)));
    }
    return parts;
  },
};

function gapWords(gap) {
  if (gap === -Infinity) return "x = −∞: the teacher finds it impossible.";
  const x = `x = ${gap < 0 ? "−" : ""}${Math.abs(gap).toFixed(2)}`;
  const times = Math.exp(Math.abs(gap));
  if (times < 1.05) return `${x}: both find it as likely.`;
  const said = times < 10 ? times.toFixed(1) : times < 1e6 ? Math.round(times).toLocaleString("en") : times.toExponential(0);
  return `${x}: the teacher finds it ${said} times ${gap < 0 ? "less" : "more"} likely.`;
}

Reader.start();
Shelf.start();
