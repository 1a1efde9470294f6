
// Of the ledger: show the claims that stand in one way, and unfold all of them.
(() => {
  "use strict";
  const claims = Array.from(document.querySelectorAll("details.claim"));
  const choose = document.getElementById("choose");
  const unfold = document.getElementById("unfold");
  choose.hidden = false;

  function show(word) {
    for (const claim of claims) {
      claim.hidden = word !== "" && !claim.classList.contains(word);
    }
    for (const heading of document.querySelectorAll(".topic")) {
      let next = heading.nextElementSibling;
      let any = false;
      while (next !== null && next.classList.contains("claim")) {
        any = any || !next.hidden;
        next = next.nextElementSibling;
      }
      heading.hidden = !any;
    }
    for (const button of choose.querySelectorAll("[data-show]")) {
      button.setAttribute("aria-pressed", String(button.dataset.show === word));
    }
  }

  function open(all) {
    for (const claim of claims) claim.open = all;
    unfold.textContent = all ? "fold all" : "unfold all";
  }

  for (const button of choose.querySelectorAll("[data-show]")) {
    button.addEventListener("click", () => show(button.dataset.show));
  }
  unfold.addEventListener("click", () => open(!claims.every((claim) => claim.open)));

  show("");
})();
