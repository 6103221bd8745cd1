"use strict";
// What a static page cannot: a token's id and label under the pointer, finding rows, and two ways of looking at them.
// Everything is shown without it.
(() => {
  const every = (what, within = document) => [...within.querySelectorAll(what)];
  const one = (name) => document.getElementById(name);
  const known = new WeakMap(); // a document's element -> the position of each of its tokens, and their ids

  function read(doc) {
    if (!known.has(doc)) {
      const positions = new Map();
      let position = 0;
      for (const piece of every(".turn i", doc)) {
        positions.set(piece, position);
        position += Number(piece.dataset.n || 1);
      }
      known.set(doc, { positions, ids: doc.dataset.ids.split(" ") });
    }
    return known.get(doc);
  }

  function tell(piece) {
    const { positions, ids } = read(piece.closest(".doc"));
    const at = positions.get(piece);
    const mine = ids.slice(at, at + Number(piece.dataset.n || 1));
    const run = piece.closest("mark");
    const range = mine.length > 1 ? `${at}–${at + mine.length - 1}` : at;
    const what = run ? (run.dataset.w ? `trained with weight ${run.dataset.w}` : "trained") : "not trained";
    const label = run ? mine.join(" ") : "-100";
    const special = piece.classList.contains("s") ? " · special token" : "";
    one("token").textContent =
      `${piece.textContent}   position ${range} of ${ids.length} · id ${mine.join(" ")} · label ${label} · ${what}${special}`;
  }

  let marked = null;
  function point(event) {
    const piece = event.target.closest(".turn i");
    if (!piece || piece === marked) return;
    if (marked) marked.classList.remove("on");
    marked = piece;
    piece.classList.add("on");
    tell(piece);
  }
  document.addEventListener("mouseover", point);
  document.addEventListener("click", point);

  function filter() {
    const words = one("find").value.trim().toLowerCase();
    const side = one("side").value;
    let shown = 0;
    const rows = every("article.row");
    for (const row of rows) {
      row.words ??= row.querySelector(".doc").textContent.replace(/[⏎·\s]+/g, " ").toLowerCase();
      const found = row.words.includes(words) || row.dataset.place.toLowerCase().includes(words);
      const fits = found && (!side || row.dataset.side === side);
      row.hidden = !fits;
      shown += fits;
    }
    one("count").textContent = shown === rows.length ? `${shown} rows` : `${shown} of ${rows.length} rows`;
  }
  one("find").addEventListener("input", filter);
  one("side").addEventListener("change", filter);

  for (const name of ["borders", "only"]) {
    const follow = () => document.body.classList.toggle(name, one(name).checked);
    one(name).addEventListener("change", follow);
    follow(); // a browser may keep a box ticked over a reload
  }
  one("theme").addEventListener("click", () => {
    const now = document.documentElement.dataset.theme;
    const dark = now ? now === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    document.documentElement.dataset.theme = dark ? "light" : "dark";
  });
  one("tools").hidden = false;
  filter();
})();
