// While a run goes on: ask for what is new, and change only what has changed.

const Live = {
  version: null,
  shelf: null,
  paused: false,
  every: 2000,

  start() {
    byId("pause").addEventListener("click", () => {
      this.paused = !this.paused;
      byId("pause").setAttribute("aria-pressed", String(this.paused));
      byId("pause").textContent = this.paused ? "Go on" : "Pause";
      this.say(this.paused ? "paused" : "live", this.paused ? "paused" : "");
      if (!this.paused) this.ask();
    });
    this.say("live", "");
    this.ask();
  },

  say(text, state) {
    const place = byId("live");
    place.className = `live ${state}`;
    if (place.textContent !== text) place.textContent = text;
  },

  async ask() {
    clearTimeout(this.timer);
    if (this.paused) return;
    try {
      const answer = await fetch(`state.json?known=${encodeURIComponent(this.version ?? "")}`, { cache: "no-store" });
      if (!answer.ok) throw new Error(`${answer.status}`);
      if (answer.status === 200) await this.take(await answer.json());
      if (!this.paused) this.say("live", "");
    } catch {
      this.say("not reachable: is tropd watch still running?", "lost");
    }
    this.timer = setTimeout(() => this.ask(), this.every);
  },

  async take(state) {
    this.version = state.version;
    const same = JSON.stringify(Data.charts.map((chart) => chart.id)) === JSON.stringify(state.data.charts.map((chart) => chart.id));
    Object.assign(Data, state.data);
    for (const [name, html] of Object.entries(state.parts)) {
      const place = document.querySelector(`[data-part="${name}"]`);
      if (name === "charts" && same) continue;
      if (place.dataset.html === html) continue;
      const open = [...place.querySelectorAll("details")].map((details) => details.open);
      place.innerHTML = html; // made by the server from the same templates, where every text is escaped
      place.dataset.html = html;
      [...place.querySelectorAll("details")].forEach((details, i) => {
        if (i in open) details.open = open[i];
      });
    }
    if (same) {
      Figures.update();
      this.replaceAlarms(state.parts.charts);
    } else {
      Figures.arrange();
      observeSections();
    }
    Figures.paintDots();
    if (state.shelf !== this.shelf) {
      this.shelf = state.shelf;
      const answer = await fetch("transcripts.json", { cache: "no-store" });
      if (answer.ok) Shelf.take(await answer.json());
    }
  },

  replaceAlarms(html) {
    const fresh = new DOMParser().parseFromString(html, "text/html").querySelector(".alarms");
    const old = document.querySelector(".alarms");
    if (fresh && old && fresh.innerHTML !== old.innerHTML) old.replaceWith(document.importNode(fresh, true));
  },
};

Live.start();
