// The report's hands: views and zoom of the drawing, what is known of a box, rows that
// open, and the timeline's cursor. Everything is reachable by keyboard. Text goes into
// the page as text, never as markup.
"use strict";
(() => {
  const one = (selector, within = document) => within.querySelector(selector);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const data = JSON.parse(one("#data").textContent);
  document.documentElement.classList.add("live");

  function made(tag, text, ...inside) {
    const element = document.createElement(tag);
    if (text) element.textContent = text;
    element.append(...inside);
    return element;
  }

  // ---- what is known of a box ----

  function described(box) {
    const card = data.cards[box.dataset.card];
    if (!card) {
      const lines = (box.dataset.tip || "").split("\n");
      return [made("h3", box.getAttribute("aria-label")), ...lines.map((line) => made("p", line))];
    }
    const facts = card.facts.map(([label, text]) => [made("dt", label), made("dd", text)]);
    const values = card.values.map(([heading, lines]) => [
      made("h4", heading),
      made("ul", "", ...lines.map((line) => made("li", line))),
    ]);
    return [
      made("h3", card.title),
      made("dl", "", ...facts.flat()),
      made("h4", "why"),
      ...card.reasons.map((reason) => made("p", reason)),
      ...values.flat(),
    ];
  }

  function hint(box) {
    const card = data.cards[box.dataset.card];
    if (!card) return [box.dataset.tip];
    const facts = Object.fromEntries(card.facts);
    const kept = ["kept for it", "kept states"].filter((key) => facts[key]);
    const lines = [
      `${facts.where} · ${facts.kind}`,
      card.title.startsWith(facts.source) ? "" : facts.source,
      facts.storage,
      ...kept.map((key) => `${key} ${facts[key]}`),
      ...card.values.filter(([heading]) => heading === "states made").map(([, made]) => `makes ${made[0]}`),
      ...card.reasons.slice(0, 2),
      box.dataset.opens || box.parentNode.querySelector(`[data-opens][data-card="${box.dataset.card}"]`)
        ? "Click to see each."
        : "",
    ];
    return [made("b", card.title), lines.filter(Boolean).join("\n")];
  }

  // ---- the drawing ----

  const LEAST = 0.1, MOST = 6, STEP = 1.25;
  const panel = one("#panel"), level = one(".zoom output"), tip = one("#tip");

  class View {
    constructor(element) {
      this.element = element;
      this.name = element.dataset.view;
      this.port = one(".viewport", element);
      this.svg = one("svg", element);
      this.width = Number(this.svg.getAttribute("width"));
      this.height = Number(this.svg.getAttribute("height"));
      this.scale = 0;
      this.boxes = all(".node[role]", this.svg);
      for (const box of this.boxes) box.tabIndex = -1;
      this.current = this.boxes.find((box) => box.dataset.card) || this.boxes[0];
      if (this.current) this.current.tabIndex = 0;
    }

    show() {
      for (const view of views) view.element.hidden = view !== this;
      one(`[name=view][value=${this.name}]`).checked = true;
      if (!this.scale) {
        this.fit();
        const along = this.width > this.height ? "x" : "y";
        const places = new Map(this.boxes.map((box) => [box, box.getBBox()[along]]));
        this.boxes.sort((a, b) => places.get(a) - places.get(b));
      }
      this.told();
    }

    told() {
      level.value = `${Math.round(100 * this.scale)} %`;
    }

    fit() {
      this.sized(Math.min(1.4, Math.max(0.8, (this.port.clientWidth - 12) / this.width)));
      this.port.scrollTo(0, 0);
    }

    sized(scale) {
      this.scale = Math.min(MOST, Math.max(LEAST, scale));
      this.svg.style.width = `${this.width * this.scale}px`;
      this.svg.style.height = `${this.height * this.scale}px`;
      this.told();
    }

    // Zooms with a point of the screen, or the middle, kept in place.
    zoom(factor, x, y) {
      const frame = this.port.getBoundingClientRect();
      x = x ?? frame.left + frame.width / 2;
      y = y ?? frame.top + frame.height / 2;
      const before = this.svg.getBoundingClientRect();
      const across = (x - before.left) / before.width, down = (y - before.top) / before.height;
      this.sized(this.scale * factor);
      const after = this.svg.getBoundingClientRect();
      this.port.scrollLeft += after.left + across * after.width - x;
      this.port.scrollTop += after.top + down * after.height - y;
    }

    choose(box) {
      if (this.current) this.current.tabIndex = -1;
      this.current = box;
      box.tabIndex = 0;
      for (const old of all(".chosen", this.svg)) old.classList.remove("chosen");
      const key = box.dataset.card;
      const alike = key ? all(".node[data-card]", this.svg).filter((b) => b.dataset.card === key) : [box];
      for (const same of alike) same.classList.add("chosen");
      panel.replaceChildren(...described(box));
      panel.scrollTop = 0;
    }

    focus(box) {
      box.focus({ preventScroll: true });
      const frame = this.port.getBoundingClientRect(), place = box.getBoundingClientRect();
      const right = place.right > frame.right - 20, left = place.left < frame.left + 20;
      if (left || right) this.port.scrollLeft += place.left - frame.left - frame.width / 3;
      if (place.top < frame.top + 20 || place.bottom > frame.bottom - 20) {
        this.port.scrollTop += place.top - frame.top - frame.height / 3;
      }
      if (frame.top < 0 || frame.bottom > innerHeight) {
        this.element.scrollIntoView({ block: "nearest" });
      }
    }

    // The nearest box in a direction, what is straight ahead first.
    towards(dx, dy) {
      const centre = (box) => {
        const { x, y, width, height } = box.getBBox();
        return [x + width / 2, y + height / 2];
      };
      const [x, y] = centre(this.current);
      let best = null, least = Infinity;
      for (const box of this.boxes) {
        const [bx, by] = centre(box);
        const ahead = (bx - x) * dx + (by - y) * dy;
        const aside = Math.abs((bx - x) * dy) + Math.abs((by - y) * dx);
        const far = ahead + 2 * aside;
        if (ahead > 1 && far < least) [best, least] = [box, far];
      }
      return best;
    }
  }

  const views = all(".view").map((element) => new View(element));
  const shown = () => views.find((view) => !view.element.hidden);
  let opened = null;

  function reveal(id) {
    const box = document.getElementById(id);
    const view = views.find((v) => box && v.svg.contains(box));
    if (!view) return false;
    view.show();
    view.focus(box);
    return true;
  }

  function open(box) {
    if (!box.dataset.opens) return;
    opened = box.id;
    reveal(box.dataset.opens);
  }

  for (const view of views) {
    const { port, svg } = view;
    // Not on the SVG, which would then take the focus itself in Chromium.
    port.addEventListener("focusin", (event) => {
      const box = event.target.closest(".node");
      if (box) view.choose(box);
    });
    port.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
      const ends = { Home: view.boxes[0], End: view.boxes.at(-1) };
      const zooms = { "+": STEP, "=": STEP, "-": 1 / STEP };
      const key = event.key;
      if (arrows[key]) {
        const next = view.towards(...arrows[key]);
        if (next) view.focus(next);
      } else if (ends[key]) view.focus(ends[key]);
      else if (zooms[key]) view.zoom(zooms[key]);
      else if (key === "0") view.fit();
      else if (key === "Enter" || key === " ") open(view.current);
      else if (key === "Escape" && view.name === "stages") reveal(opened || views[0].current.id);
      else return;
      tip.hidden = true;
      event.preventDefault();
    });
    port.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      view.zoom(Math.exp(-event.deltaY / 300), event.clientX, event.clientY);
    }, { passive: false });

    let from = null, moved = false;
    port.addEventListener("pointerdown", (event) => {
      if (event.pointerType !== "mouse" || event.button) return;
      from = [event.clientX + port.scrollLeft, event.clientY + port.scrollTop];
      moved = false;
    });
    port.addEventListener("pointermove", (event) => {
      if (!from) return;
      const left = from[0] - event.clientX, top = from[1] - event.clientY;
      if (!moved && Math.hypot(left - port.scrollLeft, top - port.scrollTop) < 5) return;
      if (!moved) port.setPointerCapture(event.pointerId);
      moved = true;
      tip.hidden = true;
      port.classList.add("dragged");
      port.scrollTo({ left, top, behavior: "instant" });
    });
    for (const end of ["pointerup", "pointercancel"]) {
      port.addEventListener(end, () => {
        from = null;
        port.classList.remove("dragged");
      });
    }
    svg.addEventListener("click", (event) => {
      const box = event.target.closest(".node");
      if (!box || moved) return;
      const key = box.dataset.card;
      const named = box.hasAttribute("role") ? box : view.boxes.find((b) => b.dataset.card === key);
      view.focus(named);
      open(named);
    });
    svg.addEventListener("pointermove", (event) => {
      const over = event.target.closest("[data-card], [data-tip]");
      tip.hidden = !over || event.pointerType !== "mouse" || Boolean(from && moved);
      if (tip.hidden) return;
      tip.replaceChildren(...hint(over));
      const { width, height } = tip.getBoundingClientRect();
      const right = event.clientX + 16 + width < innerWidth;
      tip.style.left = `${Math.max(4, right ? event.clientX + 16 : event.clientX - 16 - width)}px`;
      tip.style.top = `${Math.max(4, Math.min(event.clientY + 16, innerHeight - height - 4))}px`;
    });
    svg.addEventListener("pointerleave", () => { tip.hidden = true; });
  }
  for (const input of all("[name=view]")) {
    input.addEventListener("change", () => views.find((v) => v.name === input.value).show());
  }
  for (const button of all("[data-zoom]")) {
    const how = { in: (v) => v.zoom(STEP), out: (v) => v.zoom(1 / STEP), fit: (v) => v.fit() };
    button.addEventListener("click", () => how[button.dataset.zoom](shown()));
  }
  for (const link of all(".stages a")) {
    link.addEventListener("click", (event) => {
      if (reveal(link.hash.slice(1))) event.preventDefault();
    });
  }
  views[0].show();
  if (views[0].current) views[0].choose(views[0].current);
  addEventListener("resize", () => { if (shown().port.clientWidth < shown().width * 0.5) shown().fit(); });

  // ---- rows that open ----

  const everything = one("#open-all");
  const toggles = all(".toggle");
  function toggle(button, on) {
    button.setAttribute("aria-expanded", on);
    for (const row of all(".inside", button.closest("tbody"))) row.hidden = !on;
  }
  const isOpen = (button) => button.getAttribute("aria-expanded") === "true";
  for (const button of toggles) {
    toggle(button, false);
    button.addEventListener("click", () => toggle(button, !isOpen(button)));
  }
  everything?.addEventListener("click", () => {
    const on = !isOpen(everything);
    everything.setAttribute("aria-expanded", on);
    everything.textContent = on ? "Close all" : "Open all";
    for (const button of toggles) toggle(button, on);
  });
  addEventListener("beforeprint", () => { for (const part of all("details")) part.open = true; });

  // ---- the timeline's cursor ----

  const area = one("#curves");
  if (area) {
    const cursor = one(".cursor", area), readout = one("#readout");
    const units = ["B", "KiB", "MiB", "GiB", "TiB"];
    const size = (bytes) => {
      const power = Math.min(units.length - 1, Math.max(0, Math.floor(Math.log2(bytes || 1) / 10)));
      const number = bytes / 1024 ** power;
      return `${number.toFixed(number >= 100 || Number.isInteger(number) ? 0 : 1)} ${units[power]}`;
    };
    let at = 0;
    const move = (share) => {
      at = Math.min(100, Math.max(0, share));
      const parts = data.curves.map(([method, points]) => {
        const index = Math.min(points.length - 1, Math.floor((at / 100) * points.length));
        return `${method} ${size(points[index])}`;
      });
      const text = `${at.toFixed(0)} %: ${parts.join(", ")}`;
      cursor.hidden = false;
      cursor.style.left = `${at}%`;
      readout.textContent = text;
      area.setAttribute("aria-valuenow", at.toFixed(0));
      area.setAttribute("aria-valuetext", text);
    };
    area.addEventListener("pointermove", (event) => {
      const { left, width } = area.getBoundingClientRect();
      move((100 * (event.clientX - left)) / width);
    });
    area.addEventListener("keydown", (event) => {
      const steps = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10 };
      const places = { Home: 0, End: 100 };
      if (event.key in steps) move(at + steps[event.key]);
      else if (event.key in places) move(places[event.key]);
      else return;
      event.preventDefault();
    });
  }
})();
