(() => {
  const source = document.getElementById("data");
  const form = document.querySelector(".filter");
  if (!form) return;
  const { runs } = JSON.parse(source.textContent);
  const list = document.getElementById("runs");
  const items = [...document.querySelectorAll(".run")];
  const entries = items.map((item) => ({
    item, run: runs[item.dataset.run], order: Number(item.dataset.run), text: item.textContent.toLowerCase(),
  }));
  const find = (id) => document.getElementById(id);
  const [search, notebook, sort, shown] = ["search", "notebook", "sort", "shown"].map(find);
  const buttons = [...form.querySelectorAll("[data-verdict]")];

  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = new Set(buttons.filter((b) => b.getAttribute("aria-pressed") === "true").map((b) => b.dataset.verdict));
    let count = 0;
    for (const { item, run, text } of entries) {
      const fits = words.every((word) => text.includes(word)) && (!wanted.size || wanted.has(run.badge))
        && (!notebook.value || run.notebook === notebook.value);
      item.hidden = !fits;
      count += fits;
    }
    shown.textContent = count === runs.length ? "" : `${count} of ${runs.length} shown`;
  };
  const keys = {
    newest: (e) => e.order, oldest: (e) => -e.order, cost_usd: (e) => -e.run.cost_usd,
    duration_s: (e) => -e.run.duration_s, name: (e) => e.run.name, badge: (e) => e.run.badge,
  };
  const order = () => {
    const metric = sort.value.startsWith("metric ") && sort.value.slice(7);
    // what a run did not measure goes last
    const key = metric ? ({ run }) => { const v = run.metrics[metric]?.[0]; return typeof v === "number" ? -v : Infinity; } : keys[sort.value];
    const sorted = entries.map((e) => [key(e), e]).sort(([a, x], [b, y]) => (a < b ? -1 : a > b ? 1 : x.order - y.order));
    list.append(...sorted.map(([, e]) => e.item));
  };
  form.hidden = false;
  form.addEventListener("submit", (event) => event.preventDefault());
  search.addEventListener("input", filter);
  notebook.addEventListener("change", filter);
  sort.addEventListener("change", order);
  buttons.forEach((button) => button.addEventListener("click", () => {
    button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
    filter();
  }));
  filter();  // a browser that comes back keeps what was typed
  if (sort.value !== "newest") order();

  // two runs side by side
  const make = (tag, content, attributes = {}) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...[content ?? ""].flat());
    return node;
  };
  const figure = (value) => {
    if (value === null || value === undefined) return "–";
    if (typeof value !== "number") return typeof value === "string" ? value : JSON.stringify(value);
    return Number.isInteger(value) || Math.abs(value) >= 1e4 ? value.toLocaleString("en", { maximumFractionDigits: 0 }) : String(Number(value.toPrecision(3)));
  };
  const interval = ([value, low, high]) => figure(value) + (typeof low === "number" ? ` [${figure(low)}, ${figure(high)}]` : "");
  const table = (label, head, rows) => make("div", make("table", [
    make("thead", make("tr", head.map((text) => make("th", text, { scope: "col" })))),
    make("tbody", rows),
  ]), { class: "scroll", tabindex: 0, role: "group", "aria-label": label });
  const row = (name, cells, attributes) => make("tr", [make("th", name, { scope: "row" }), ...cells.map((cell) => make("td", cell))], attributes);
  const plain = (name) => name.replaceAll("_", " ");
  const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);

  const parameters = (a, b) => {
    const names = [...new Set([...Object.keys(a.params), ...Object.keys(b.params)])];
    const apart = names.filter((name) => !same(a.params[name], b.params[name]));
    const rows = apart.map((name) => row(make("code", name), [figure(a.params[name]), figure(b.params[name])]));
    return [make("h3", "Parameters"),
      rows.length ? table("Parameters that differ", ["parameter", a.name, b.name], rows) : make("p", "All equal."),
      make("p", rows.length ? `${names.length - apart.length} others are equal.` : "", { class: "soft" })];
  };
  const metrics = (a, b) => {
    const names = [...new Set([...Object.keys(a.metrics), ...Object.keys(b.metrics)])];
    const rows = names.filter((name) => a.metrics[name] || b.metrics[name]).map((name) => {
      const [x, y] = [a.metrics[name] ?? [null], b.metrics[name] ?? [null]];
      const both = typeof x[0] === "number" && typeof y[0] === "number";
      const measured = both && typeof x[1] === "number" && typeof y[1] === "number";
      const clear = measured && (x[2] < y[1] || y[2] < x[1]);
      const change = both ? (y[0] > x[0] ? "+" : y[0] < x[0] ? "−" : "") + figure(Math.abs(y[0] - x[0])) : "";
      return row(plain(name), [interval(x), interval(y), change + (clear ? " *" : "")], clear ? { class: "apart" } : {});
    });
    return [make("h3", "Figures"), table("Figures", ["figure", a.name, b.name, "change"], rows),
      make("p", "[ , ] are 95 % intervals over objects; * marks a change whose two intervals do not overlap.", { class: "soft" })];
  };
  const pictures = (a, b) => {
    const names = Object.keys(a.pictures).filter((name) => b.pictures[name]);
    const pairs = names.length ? names.map((name) => [name, a.pictures[name], b.pictures[name]]) : [["thumbnail", a.thumbnail, b.thumbnail]];
    const shownPairs = pairs.filter(([, x, y]) => x || y).map(([name, x, y]) => make("div", [[a, x], [b, y]].map(([run, file]) =>
      make("figure", [file ? make("img", null, { src: file, alt: `${plain(name)} of ${run.name}` }) : make("p", "no picture"), make("figcaption", `${run.name}: ${plain(name)}`)])), { class: "pair" }));
    return shownPairs.length ? [make("h3", "Pictures"), ...shownPairs] : [];
  };
  const origin = (a, b) => {
    const hashes = (run) => run.data.map(([path, objects, hash]) => `${path ?? "?"}: ${objects ?? "?"} objects, ${(hash ?? "?").slice(0, 19)}`).join("; ") || "–";
    const code = (run) => (run.commit ? run.commit.slice(0, 12) : "unknown commit") + (run.dirty ? `, changed: ${run.changed.join(", ") || "yes"}` : "");
    const rows = [["data", hashes(a), hashes(b), same(a.data.map((d) => d[2]), b.data.map((d) => d[2]))],
      ["code", code(a), code(b), a.commit === b.commit && !a.dirty && !b.dirty],
      ["hardware", a.hardware || "–", b.hardware || "–", a.hardware === b.hardware],
      ["seed", figure(a.seed), figure(b.seed), a.seed === b.seed]];
    const [x, y] = [a.software, b.software];
    for (const name of new Set([...Object.keys(x), ...Object.keys(y)])) {
      if (x[name] !== y[name]) rows.push([name, x[name] ?? "none", y[name] ?? "none", false]);
    }
    return [make("h3", "Data, code and machine"), table("Data, code and machine", ["", a.name, b.name, ""],
      rows.map(([name, s, t, equal]) => row(name, [s, t, equal ? "same" : "differs"])))];
  };
  const outcome = (a, b) => table("Outcome", ["", a.name, b.name], [
    row("verdict", [a, b].map((run) => make("span", run.badge, { class: `badge ${run.tone}` }))),
    row("when", [a, b].map((run) => run.when.slice(0, 16).replace("T", " "))),
    row("time", [a, b].map((run) => `${figure(run.duration_s)} s`)),
    row("cost", [a, b].map((run) => `$${run.cost_usd.toFixed(run.cost_usd < 0.01 && run.cost_usd ? 4 : 2)}`)),
    row("report", [a, b].map((run) => (run.link ? make("a", "open", { href: run.link, "aria-label": `Report of ${run.name}` }) : "none"))),
  ]);

  const picked = [];
  const panel = find("comparison");
  const boxes = entries.map(({ item }) => item.querySelector(".pick input"));
  const show = () => {
    entries.forEach(({ item, order: i }) => {
      boxes[i].checked = picked.includes(i);
      item.classList.toggle("picked", picked.includes(i));
    });
    panel.hidden = !picked.length;
    if (!picked.length) return;
    const clear = make("button", "Clear", { class: "button", type: "button" });
    clear.addEventListener("click", () => { const [last] = picked.splice(0).slice(-1); show(); boxes[last].focus(); });
    const bar = make("div", clear, { class: "bar" });
    if (picked.length === 1) {
      panel.replaceChildren(bar, make("h2", `${runs[picked[0]].name}, beside …`, { id: "compared" }),
        make("p", "Pick a second run to see where the two differ.", { class: "soft" }));
      return;
    }
    // the older one first, so that a change reads as from then to now
    const [a, b] = [...picked].sort((x, y) => y - x).map((i) => runs[i]);
    panel.replaceChildren(bar, make("h2", `${a.name} beside ${b.name}`, { id: "compared", tabindex: -1 }),
      outcome(a, b), ...parameters(a, b), ...metrics(a, b), ...pictures(a, b), ...origin(a, b));
    find("compared").focus();
    panel.scrollIntoView({ block: "start" });
  };
  entries.forEach(({ item, order: i }) => {
    item.querySelector(".pick").hidden = false;
    boxes[i].setAttribute("aria-label", `Compare ${runs[i].name}, ${runs[i].when.slice(0, 16)}`);
    boxes[i].addEventListener("change", () => {
      if (!boxes[i].checked) picked.splice(picked.indexOf(i), 1);
      else if (picked.push(i) > 2) picked.shift();
      show();
    });
  });
})();
