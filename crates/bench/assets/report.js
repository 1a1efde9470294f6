// Adds to the page what a picture cannot do: values at the pointer, and a switch between dark and light. Without it
// the page is whole; hovering then shows the titles of the pictures' parts.
(() => {
  "use strict";
  const root = document.documentElement;
  const tip = document.getElementById("tip");

  function show(text, event) {
    tip.textContent = text;
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    const left = event.clientX + 14 + width > innerWidth ? event.clientX - 14 - width : event.clientX + 14;
    const top = event.clientY + 16 + height > innerHeight ? event.clientY - 12 - height : event.clientY + 16;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${Math.max(4, top)}px`;
  }

  function hide() {
    tip.hidden = true;
  }

  // The browser's own tips come late and small; theirs are replaced.
  for (const title of document.querySelectorAll("svg title")) {
    title.parentNode.setAttribute("data-tip", title.textContent);
    title.remove();
  }

  // ---- values of lines ----

  function series(svg) {
    const numbers = (path, name) => path.getAttribute(name).split("|").map(Number);
    return Array.from(svg.querySelectorAll("path[data-x]"), (path) => ({
      name: path.getAttribute("data-name"),
      x: numbers(path, "data-x"),
      y: path.getAttribute("data-y").split("|"),
      places: places(path),
    }));
  }

  // Where the points of a line are in the picture: its path has one command a point.
  function places(path) {
    return path.getAttribute("d").slice(1).split("L").map((point) => Number(point.split(" ")[0]));
  }

  function nearest(places, at) {
    let best = 0;
    for (let i = 1; i < places.length; i++) {
      if (Math.abs(places[i] - at) < Math.abs(places[best] - at)) best = i;
    }
    return best;
  }

  function watch(svg) {
    const lines = series(svg);
    if (lines.length === 0) return;
    const unit = svg.querySelector(".name").textContent;
    const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
    cursor.setAttribute("class", "cursor");
    const box = svg.viewBox.baseVal;
    cursor.setAttribute("y1", 30);
    cursor.setAttribute("y2", box.height - 42);
    svg.addEventListener("pointermove", (event) => {
      if (event.target.closest("[data-tip]")) return cursor.remove();
      const bounds = svg.getBoundingClientRect();
      const at = ((event.clientX - bounds.left) / bounds.width) * box.width;
      const found = nearest(lines[0].places, at);
      const place = lines[0].places[found];
      const rows = lines.map((line) => {
        const i = nearest(line.places, place);
        return Math.abs(line.places[i] - place) < 1 ? `${line.name}: ${line.y[i]}` : null;
      });
      cursor.setAttribute("x1", place);
      cursor.setAttribute("x2", place);
      svg.append(cursor);
      show(`at ${lines[0].x[found]}, ${unit}\n${rows.filter((row) => row !== null).join("\n")}`, event);
    });
    svg.addEventListener("pointerleave", () => {
      cursor.remove();
      hide();
    });
  }

  document.querySelectorAll("svg").forEach(watch);

  // ---- definitions, bars and points ----

  document.addEventListener("pointermove", (event) => {
    const owner = event.target.closest("[data-tip]");
    if (owner) show(owner.getAttribute("data-tip"), event);
    else if (!event.target.closest("svg")) hide();
  });
  document.addEventListener("focusin", (event) => {
    const owner = event.target.closest("[data-tip]");
    if (!owner) return;
    const { left, bottom } = owner.getBoundingClientRect();
    show(owner.getAttribute("data-tip"), { clientX: left, clientY: bottom });
  });
  document.addEventListener("focusout", hide);

  // ---- dark and light ----

  const button = document.getElementById("theme");
  button.hidden = false;
  button.addEventListener("click", () => {
    const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = isDark ? "light" : "dark";
  });

  // ---- folded levels open for a link to them ----

  function unfold() {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target && target.tagName.toLowerCase() === "details") target.open = true;
  }

  addEventListener("hashchange", unfold);
  unfold();
})();
