"use strict";
// What the whole page does: commands are copied, pictures enlarged, the navigation shows where one is.

for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", async () => {
    const code = button.previousElementSibling;
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {  // not allowed here: select it, so that the keyboard can
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}

const large = document.getElementById("large");
for (const picture of document.querySelectorAll(".picture")) {
  picture.addEventListener("click", () => {
    const image = picture.querySelector("img");
    large.querySelector("img").src = image.src;
    large.querySelector("img").alt = image.alt;
    large.querySelector("p").textContent = picture.parentElement.querySelector("figcaption").textContent;
    large.showModal();
  });
}
large.addEventListener("click", (event) => {
  if (event.target === large || event.target.tagName === "IMG") large.close();
});

const links = new Map();
for (const link of document.querySelectorAll("nav > ul > li > a")) links.set(link.hash.slice(1), link);
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    for (const link of links.values()) link.removeAttribute("aria-current");
    const link = links.get(entry.target.id);
    link.setAttribute("aria-current", "true");
    document.querySelector("nav").scrollTo({ left: link.offsetLeft - 90 });  // a narrow screen does not show all of them
  }
}, { rootMargin: "-15% 0px -80% 0px" });
for (const id of links.keys()) seen.observe(document.getElementById(id));

addEventListener("beforeprint", () => {
  for (const box of document.querySelectorAll("details.note")) box.open = true;
});
