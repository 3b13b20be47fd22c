(() => {
  const form = document.querySelector(".filter");
  if (!form) return;
  const runs = [...document.querySelectorAll(".run")].map((item) => ({ item, text: item.textContent.toLowerCase() }));
  const buttons = [...form.querySelectorAll("[data-verdict]")];
  const search = document.getElementById("search");
  const shown = document.getElementById("shown");
  const apply = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = new Set(buttons.filter((b) => b.getAttribute("aria-pressed") === "true").map((b) => b.dataset.verdict));
    let count = 0;
    for (const { item, text } of runs) {
      const fits = words.every((word) => text.includes(word)) && (!wanted.size || wanted.has(item.dataset.verdict));
      item.hidden = !fits;
      count += fits;
    }
    shown.textContent = count === runs.length ? "" : `${count} of ${runs.length} shown`;
  };
  form.hidden = false;
  form.addEventListener("submit", (event) => event.preventDefault());
  search.addEventListener("input", apply);
  buttons.forEach((button) => button.addEventListener("click", () => {
    button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
    apply();
  }));
})();
