// The transcripts: found, filtered, put in order, and listed.  Only rows in view exist as elements.

const AUTHORS = { s: "student", t: "teacher", e: "environment" };
const FINISHES = { stop: "its own end", length: "the length limit", abort: "an abort" };
const ROW = 74;

const Shelf = {
  all: [],
  fates: [],
  words: [],
  kept: 0,
  found: [],
  chosen: null,

  async start() {
    const form = byId("filters");
    form.addEventListener("input", () => this.search(true));
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(() => this.search(true), 0));
    const list = byId("list");
    list.addEventListener("scroll", () => this.show());
    list.addEventListener("keydown", (event) => this.onKey(event));
    window.addEventListener("resize", () => this.show());
    try {
      this.take(JSON.parse(await unpack("transcripts")));
    } catch (error) {
      byId("found").textContent = `The transcripts cannot be shown: ${error.message}`;
    }
  },

  // A new set; what the reader chose stays chosen as far as it is still there.
  take(data) {
    this.fates = data.fates;
    this.words = data.words;
    this.kept = data.kept;
    this.all = data.transcripts;
    this.all.forEach((one, i) => {
      one.number = i;
      one.text = one.response ?? one.texts.join("");
      one.searched = `${one.prompt}\n${one.text}`.toLowerCase();
      one.key = `${one.run}/${one.step}/${one.id}`;
    });
    this.fillFilters();
    byId("filters").hidden = this.all.length === 0;
    this.search();
  },

  fillFilters() {
    const form = byId("filters");
    const several = Data.runs.length > 1;
    const rewarded = this.all.some((one) => one.reward !== null);
    for (const part of form.querySelectorAll('[data-only="runs"]')) part.hidden = !several;
    for (const part of form.querySelectorAll('[data-only="rewards"]')) part.hidden = !rewarded;
    const values = (of) => [...new Set(this.all.flatMap(of))];
    fillSelect(form.run, values((one) => one.run).map((run) => [String(run), Data.runs[run].name]), "all runs");
    fillSelect(form.step, values((one) => one.step).sort((a, b) => a - b).map((step) => [String(step), String(step)]), "all steps");
    fillSelect(form.author, values((one) => [...new Set(one.authors)]).map((code) => [code, AUTHORS[code] ?? code]), "anyone");
    fillSelect(form.fate, values((one) => [...new Set(one.fates)]).sort((a, b) => a - b).map((f) => [String(f), fateName(this.fates[f])]), "any fate");
    fillSelect(form.finish, values((one) => one.finish).map((finish) => [finish, FINISHES[finish] ?? finish]), "anything");
  },

  // `asked`: the reader asked for another selection, so its first transcript is shown.
  search(asked = false) {
    const form = byId("filters");
    const text = form.text.value.trim().toLowerCase();
    const number = (input) => (input.value === "" ? null : Number(input.value));
    const [least, most] = [number(form.least), number(form.most)];
    const fate = form.fate.value === "" ? null : Number(form.fate.value);
    this.found = this.all.filter(
      (one) =>
        (text === "" || one.searched.includes(text)) &&
        (form.run.value === "" || one.run === Number(form.run.value)) &&
        (form.step.value === "" || one.step === Number(form.step.value)) &&
        (form.author.value === "" || one.authors.includes(form.author.value)) &&
        (fate === null || one.fates.includes(fate)) &&
        (least === null || (one.reward !== null && one.reward >= least)) &&
        (most === null || (one.reward !== null && one.reward <= most)) &&
        (form.finish.value === "" || one.finish === form.finish.value),
    );
    const orders = {
      gap: (a, b) => (b.gap ?? -1) - (a.gap ?? -1),
      high: (a, b) => (b.reward ?? -Infinity) - (a.reward ?? -Infinity),
      low: (a, b) => (a.reward ?? Infinity) - (b.reward ?? Infinity),
      long: (a, b) => b.ids.length - a.ids.length,
    };
    this.found.sort(orders[form.order.value] ?? ((a, b) => a.step - b.step || a.number - b.number));
    byId("found").textContent = this.summary();
    byId("reader").hidden = this.found.length === 0;
    const kept = !asked && this.found.find((one) => one.key === this.chosen?.key);
    byId("list-inner").style.height = `${this.found.length * ROW}px`;
    if (this.found.length) this.choose(kept || this.found[0], !kept);
    this.show();
  },

  summary() {
    if (!this.all.length) return "No rollouts were kept (rollout.save_every decides which steps keep theirs).";
    const [found, all, kept] = [this.found.length, this.all.length, this.kept].map((n) => n.toLocaleString("en"));
    const there = this.kept > this.all.length ? `${all} of ${kept} kept transcripts are in this page, spread evenly over the steps` : `${all} transcripts`;
    return this.found.length === this.all.length ? `${there}.` : `${found} found; ${there}.`;
  },

  show() {
    const list = byId("list");
    const begin = Math.max(0, Math.floor(list.scrollTop / ROW) - 3);
    const end = Math.min(this.found.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 3);
    byId("list-inner").replaceChildren(...this.found.slice(begin, end).map((one, i) => this.option(one, begin + i)));
    const active = this.found.indexOf(this.chosen);
    if (active >= begin && active < end) list.setAttribute("aria-activedescendant", `option-${active}`);
    else list.removeAttribute("aria-activedescendant");
  },

  option(one, position) {
    const run = Data.runs.length > 1 ? `${Data.runs[one.run].name} · ` : "";
    const gap = one.gap === null ? "" : ` · gap ${one.gap.toFixed(1)}`;
    const made = make(
      "div",
      {
        class: "option",
        role: "option",
        id: `option-${position}`,
        "aria-selected": String(one === this.chosen),
        "aria-posinset": String(position + 1),
        "aria-setsize": String(this.found.length),
        style: `top: ${position * ROW}px`,
      },
      make("b", {}, one.text.trim().slice(0, 200) || "(empty answer)"),
      make("span", {}, one.prompt.trim().slice(-200)),
      make("span", {}, `${run}step ${one.step}${one.reward === null ? "" : ` · reward ${say(one.reward)}`}${gap}`),
    );
    made.addEventListener("click", () => {
      this.choose(one);
      this.show();
    });
    return made;
  },

  onKey(event) {
    const at = this.found.indexOf(this.chosen);
    const moves = { ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + 8, PageUp: at - 8, Home: 0, End: this.found.length - 1 };
    if (!(event.key in moves) || !this.found.length) return;
    event.preventDefault();
    const next = Math.min(Math.max(moves[event.key], 0), this.found.length - 1);
    const list = byId("list");
    if (next * ROW < list.scrollTop) list.scrollTop = next * ROW;
    if ((next + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (next + 1) * ROW - list.clientHeight;
    this.choose(this.found[next]);
    this.show();
  },

  choose(one, scrolled = false) {
    this.chosen = one;
    if (scrolled) byId("list").scrollTop = 0;
    Reader.open(one, byId("filters").text.value.trim().toLowerCase());
  },
};

function fillSelect(select, pairs, all) {
  const before = select.value;
  select.replaceChildren(make("option", { value: "" }, all), ...pairs.map(([value, label]) => make("option", { value }, label)));
  if ([...select.options].some((option) => option.value === before)) select.value = before;
}

function fateName(fate) {
  return fate === "" ? "no term" : fate.replaceAll("_", " ");
}
