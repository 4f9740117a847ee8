"use strict";
// Small helps for forms: choosing 2 to 8 runs, choosers that send at once, and a sign that work goes on.
for (const form of document.querySelectorAll("form[data-choose]")) {
  const [least, most] = form.dataset.choose.split("-").map(Number);
  const button = form.querySelector("button");
  const update = () => {
    const count = form.querySelectorAll("input[type=checkbox]:checked").length;
    button.disabled = count < least || count > most;
    button.textContent = count > most ? `At most ${most} runs` : count ? `Compare ${count} chosen run${count > 1 ? "s" : ""}` : "Compare the chosen runs";
  };
  form.addEventListener("change", update);
  update();
}
for (const chooser of document.querySelectorAll("select[data-submit]")) chooser.addEventListener("change", () => chooser.form.requestSubmit());
for (const form of document.querySelectorAll("form[data-busy]")) {
  const button = form.querySelector("button"), label = button.textContent;
  let clock = 0;
  form.addEventListener("submit", () => {
    const begun = Date.now();
    button.textContent = form.dataset.busy;
    button.disabled = true;
    clock = setInterval(() => (button.textContent = `${form.dataset.busy} ${Math.round((Date.now() - begun) / 1000)} s`), 1000);
  });
  // A page that comes back from the browser's history is as it was left.
  addEventListener("pageshow", () => {
    clearInterval(clock);
    button.textContent = label;
    button.disabled = false;
  });
}
