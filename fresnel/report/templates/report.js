(() => {
  const cells = [...document.querySelectorAll("details.code")];
  const button = document.getElementById("code");
  if (button && cells.length) {
    button.hidden = false;
    button.addEventListener("click", () => {
      const open = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(open));
      cells.forEach((cell) => { cell.open = open; });
    });
  }
  // paper has nothing to click on: what is folded for want of room comes out there
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details.params:not([open]), details.fold:not([open])")];
    opened.forEach((fold) => { fold.open = true; });
  });
  addEventListener("afterprint", () => opened.forEach((fold) => { fold.open = false; }));
  const toc = document.querySelector("nav.toc details");
  const wide = matchMedia("(min-width: 62rem)");
  const fit = () => { if (toc) toc.open = wide.matches; };
  fit();
  wide.addEventListener("change", fit);
  const links = new Map([...document.querySelectorAll("nav.toc a")].map((a) => [a.hash.slice(1), a]));
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      links.forEach((a) => a.removeAttribute("aria-current"));
      links.get(encodeURIComponent(entry.target.id))?.setAttribute("aria-current", "true");
      links.get(entry.target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "0px 0px -75% 0px" });
  document.querySelectorAll("main h2[id], section.end h2[id]").forEach((h) => seen.observe(h));
})();
