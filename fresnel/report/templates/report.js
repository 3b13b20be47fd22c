(() => {
  const cells = [...document.querySelectorAll("details.code")];
  const button = document.getElementById("code");
  if (button && cells.length) {
    button.hidden = false;
    button.addEventListener("click", () => {
      const open = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(open));
      button.textContent = open ? "Hide code" : "Show code";
      cells.forEach((cell) => { cell.open = open; });
    });
  }
  // paper has nothing to click on: what is folded for want of room comes out there
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details.part:not([open]), details.fold:not([open]):not(:has(> pre))")];
    opened.forEach((fold) => { fold.open = true; });
  });
  addEventListener("afterprint", () => opened.forEach((fold) => { fold.open = false; }));
  // a picture as large as the window: moved there and back, as a copy would have the same names
  const dialog = document.createElement("dialog");
  dialog.className = "zoom";
  dialog.setAttribute("aria-label", "Enlarged picture");
  const close = document.createElement("button");
  Object.assign(close, { type: "button", className: "button", textContent: "Close" });
  const stage = document.createElement("div");
  dialog.append(close, stage);
  document.body.append(dialog);
  const place = document.createComment("");
  close.addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target !== close) dialog.close(); });
  dialog.addEventListener("close", () => {
    if (stage.firstChild) place.replaceWith(stage.firstChild);
  });
  document.querySelectorAll("figure.picture").forEach((figure) => {
    const picture = figure.querySelector("img, svg");
    const caption = figure.querySelector(".caption");
    if (!picture || !caption) return;
    const enlarge = () => {
      figure.style.minHeight = `${figure.offsetHeight}px`;
      picture.replaceWith(place);
      stage.replaceChildren(picture);
      dialog.showModal();
    };
    const button = document.createElement("button");
    Object.assign(button, { type: "button", className: "button enlarge", textContent: "Enlarge" });
    button.setAttribute("aria-label", `Enlarge ${caption.querySelector("b").textContent.replace(".", "")}`);
    button.addEventListener("click", enlarge);
    caption.append(" ", button);
    picture.addEventListener("click", () => { if (!dialog.open) enlarge(); });
    figure.classList.add("zooms");
  });
  // a link into a folded part unfolds it
  const unfold = () => {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    const fold = target && target.closest("details");
    if (fold) fold.open = true;
  };
  addEventListener("hashchange", unfold);
  unfold();
  const toc = document.querySelector("nav.toc details");
  const wide = matchMedia("(min-width: 88rem)");
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
