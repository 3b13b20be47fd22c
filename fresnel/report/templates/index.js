(() => {
  const source = document.getElementById("data");
  const form = document.querySelector(".filter");
  if (!form) return;
  const { runs } = JSON.parse(source.textContent);
  const items = [...document.querySelectorAll(".run")];
  const entries = items.map((item) => ({
    item, run: runs[item.dataset.run], order: Number(item.dataset.run), text: item.textContent.toLowerCase(), list: item.parentElement,
  })).sort((x, y) => x.order - y.order);
  const find = (id) => document.getElementById(id);
  const [search, notebook, sort, shown, view, tabled] = ["search", "notebook", "sort", "shown", "view", "table"].map(find);
  const buttons = [...form.querySelectorAll("[data-verdict]")];

  const studies = [...document.querySelectorAll(".study")];
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
    studies.forEach((study) => {
      if (count < runs.length && entries.some(({ item }) => !item.hidden && study.contains(item))) study.open = true;
    });
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
    sorted.forEach(([, e]) => e.list.append(e.item));
    return sorted.map(([, e]) => e);
  };
  const press = (button, on) => button.setAttribute("aria-pressed", String(on));
  const pressed = (button) => button.getAttribute("aria-pressed") === "true";
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

  // some runs side by side
  const differ = (values) => values.some((value) => !same(value, values[0]));
  const union = (of, key) => [...new Set(of.flatMap((run) => Object.keys(run[key])))];
  const parameters = (of) => {
    const names = union(of, "params");
    const apart = names.filter((name) => differ(of.map((run) => run.params[name])));
    const rows = apart.map((name) => row(make("code", name), of.map((run) => figure(run.params[name]))));
    return [make("h3", "Parameters"),
      rows.length ? table("Parameters that differ", ["parameter", ...of.map((run) => run.name)], rows) : make("p", "All equal."),
      make("p", rows.length ? `${names.length - apart.length} others are equal.` : "", { class: "soft" })];
  };
  const metrics = (of) => {
    const two = of.length === 2;
    const rows = union(of, "metrics").map((name) => {
      const found = of.map((run) => run.metrics[name] ?? [null]);
      if (!two) return row(plain(name), found.map(interval));
      const [x, y] = found;
      const both = typeof x[0] === "number" && typeof y[0] === "number";
      const measured = both && typeof x[1] === "number" && typeof y[1] === "number";
      const clear = measured && (x[2] < y[1] || y[2] < x[1]);
      const change = both ? (y[0] > x[0] ? "+" : y[0] < x[0] ? "−" : "") + figure(Math.abs(y[0] - x[0])) : "";
      return row(plain(name), [interval(x), interval(y), change + (clear ? " *" : "")], clear ? { class: "apart" } : {});
    });
    return [make("h3", "Figures"), table("Figures", ["figure", ...of.map((run) => run.name), ...(two ? ["change"] : [])], rows),
      make("p", `[ , ] are 95 % intervals over objects${two ? "; * marks a change whose two intervals do not overlap" : ""}.`, { class: "soft" })];
  };
  const pictures = (of) => {
    const names = Object.keys(of[0].pictures).filter((name) => of.every((run) => run.pictures[name]));
    const sets = names.length ? names.map((name) => [name, of.map((run) => run.pictures[name])]) : [["thumbnail", of.map((run) => run.thumbnail)]];
    const shownSets = sets.filter(([, files]) => files.some(Boolean)).map(([name, files]) => make("div", files.map((file, i) =>
      make("figure", [file ? make("img", null, { src: file, alt: `${plain(name)} of ${of[i].name}` }) : make("p", "no picture"), make("figcaption", `${of[i].name}: ${plain(name)}`)])), { class: "pair" }));
    return shownSets.length ? [make("h3", "Pictures"), ...shownSets] : [];
  };
  const origin = (of) => {
    const hashes = (run) => run.data.map(([path, objects, hash]) => `${path ?? "?"}: ${objects ?? "?"} objects, ${(hash ?? "?").slice(0, 19)}`).join("; ") || "–";
    const code = (run) => (run.commit ? run.commit.slice(0, 12) : "unknown commit") + (run.dirty ? `, changed: ${run.changed.join(", ") || "yes"}` : "");
    const rows = [["data", hashes, differ(of.map((run) => run.data.map((d) => d[2])))],
      ["code", code, differ(of.map((run) => run.commit)) || of.some((run) => run.dirty)],
      ["hardware", (run) => run.hardware || "–", differ(of.map((run) => run.hardware))],
      ["seed", (run) => figure(run.seed), differ(of.map((run) => run.seed))]];
    for (const name of union(of, "software")) {
      if (differ(of.map((run) => run.software[name]))) rows.push([name, (run) => run.software[name] ?? "none", true]);
    }
    return [make("h3", "Data, code and machine"), table("Data, code and machine", ["what", ...of.map((run) => run.name), "equal"],
      rows.map(([name, say, apart]) => row(name, [...of.map(say), apart ? "differs" : "same"])))];
  };
  const money = (usd) => `$${usd.toFixed(usd < 0.01 && usd ? 4 : 2)}`;
  const badge = (run) => make("span", run.badge, { class: `badge ${run.tone}` });
  const outcome = (of) => table("Outcome", ["what", ...of.map((run) => run.name)], [
    row("verdict", of.map(badge)),
    row("when", of.map((run) => run.when.slice(0, 16).replace("T", " "))),
    row("time", of.map((run) => `${figure(run.duration_s)} s`)),
    row("cost", of.map((run) => money(run.cost_usd))),
    row("report", of.map((run) => (run.link ? make("a", "open", { href: run.link, "aria-label": `Report of ${run.name}` }) : "none"))),
  ]);

  const picked = [];
  const panel = find("comparison");
  const boxes = entries.map(({ item }) => item.querySelector(".pick input"));
  const compare = (jump) => {
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
        make("p", "Pick a second run, or more, to see where they differ.", { class: "soft" }));
      return;
    }
    // the oldest one first, so that a change reads as from then to now
    const of = [...picked].sort((x, y) => y - x).map((i) => runs[i]);
    panel.replaceChildren(bar, make("h2", of.map((run) => run.name).join(" beside "), { id: "compared", tabindex: -1 }),
      outcome(of), ...parameters(of), ...metrics(of), ...pictures(of), ...origin(of));
    if (!jump) return;
    find("compared").focus();
    panel.scrollIntoView({ block: "start" });
  };
  entries.forEach(({ item, order: i }) => {
    item.querySelector(".pick").hidden = false;
    boxes[i].setAttribute("aria-label", `Compare ${runs[i].name}, ${runs[i].when.slice(0, 16)}`);
    boxes[i].addEventListener("change", () => {
      if (!boxes[i].checked) picked.splice(picked.indexOf(i), 1);
      else picked.push(i);
      show(true);
    });
  });

  // the same runs as a table, in the same order
  const metricNames = [...sort.options].map((option) => option.value).filter((value) => value.startsWith("metric "));
  const columns = [["run", "name"], ["verdict", "badge"], ["when", "newest"], ...metricNames.map((value) => [[...sort.options].find((o) => o.value === value).textContent, value]), ["time", "duration_s"], ["cost", "cost_usd"]];
  const tabulate = (ordered) => {
    const head = columns.map(([title, key]) => {
      const button = make("button", title, { type: "button", class: "sorts", "aria-pressed": sort.value === key });
      button.addEventListener("click", () => { sort.value = key; show(); tabled.querySelector("[aria-pressed=true]")?.focus(); });
      return button;
    });
    const rows = ordered.filter(({ item }) => !item.hidden).map(({ run }) => row([run.link ? make("a", run.name, { href: run.link }) : run.name, run.published ? make("small", " published") : ""], [
      badge(run), run.when.slice(0, 16).replace("T", " "),
      ...metricNames.map((value) => figure(run.metrics[value.slice(7)]?.[0])), `${figure(run.duration_s)} s`, money(run.cost_usd)]));
    tabled.replaceChildren(table("Runs", head, rows));
  };

  // what is shown is in the address: to be kept, or sent to somebody
  const show = (jump = false) => {
    filter();
    const ordered = order(), asTable = pressed(view);
    document.querySelectorAll("ol.runs").forEach((each) => { each.hidden = asTable; });
    tabled.hidden = !asTable;
    if (asTable) tabulate(ordered);
    compare(jump);
    const said = { find: search.value, from: notebook.value, by: sort.value === "newest" ? "" : sort.value,
      verdict: buttons.filter(pressed).map((b) => b.dataset.verdict).join(","), view: asTable ? "table" : "",
      compare: picked.map((i) => runs[i].id).join(",") };
    const address = new URLSearchParams(Object.entries(said).filter(([, value]) => value)).toString();
    if (address || location.hash.includes("=")) history.replaceState(null, "", address ? `#${address}` : location.pathname + location.search);
  };
  const recall = () => {
    const said = new URLSearchParams(location.hash.slice(1));
    search.value = said.get("find") ?? "";
    notebook.value = said.get("from") ?? "";
    sort.value = said.get("by") ?? "newest";
    if (sort.selectedIndex < 0) sort.value = "newest";
    if (notebook.selectedIndex < 0) notebook.value = "";
    const wanted = (said.get("verdict") ?? "").split(",");
    buttons.forEach((button) => press(button, wanted.includes(button.dataset.verdict)));
    press(view, said.get("view") === "table");
    picked.splice(0, picked.length, ...(said.get("compare") ?? "").split(",").map((id) => runs.findIndex((run) => run.id === id)).filter((i) => i >= 0));
    show();
  };
  form.hidden = false;
  form.addEventListener("submit", (event) => event.preventDefault());
  search.addEventListener("input", () => show());
  notebook.addEventListener("change", () => show());
  sort.addEventListener("change", () => show());
  [...buttons, view].forEach((button) => button.addEventListener("click", () => { press(button, !pressed(button)); show(); }));
  addEventListener("hashchange", recall);
  recall();
})();
