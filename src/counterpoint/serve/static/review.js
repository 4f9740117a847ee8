"use strict";
// Review the moments of a detection by keyboard: j and k choose, a accepts, r rejects, u takes back, space plays, e exports, n is the next video.
for (const root of document.querySelectorAll(".review")) {
  const decided = JSON.parse(root.querySelector("script[data-decided]").textContent);
  const token = document.querySelector('meta[name="form-token"]').content;
  const rows = [...root.querySelectorAll("tr[data-seek]")];
  const video = root.querySelector("video"), count = root.querySelector("[data-count]");
  const name = (row) => `${row.dataset.seek}-${row.dataset.end}`;
  let chosen = -1;

  const head = root.querySelector("thead tr");
  if (head && rows.length) {
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.textContent = "decision";
    head.prepend(cell);
    for (const row of rows) {
      const mark = document.createElement("td");
      mark.className = "decision";
      row.prepend(mark);
    }
  }
  const show = () => {
    let done = 0;
    for (const row of rows) {
      const decision = decided[name(row)] || "";
      row.dataset.decision = decision;
      row.querySelector("td.decision").textContent = { accept: "✓ accepted", reject: "✗ rejected" }[decision] || "";
      done += decision !== "";
    }
    count.textContent = `${done} of ${rows.length} moments decided`;
  };
  const choose = (at) => {
    if (!rows.length) return;
    chosen = Math.min(rows.length - 1, Math.max(0, at));
    rows.forEach((row, i) => {
      row.classList.toggle("chosen", i === chosen);
      row.toggleAttribute("aria-selected", i === chosen);
    });
    rows[chosen].click(); // the timeline seeks
    rows[chosen].scrollIntoView({ block: "nearest" });
  };
  const decide = async (decision) => {
    if (chosen < 0) choose(0);
    if (chosen < 0) return;
    const row = rows[chosen];
    const answer = await fetch(root.dataset.decide, {
      method: "POST",
      headers: { "content-type": "application/json", "x-form-token": token, accept: "application/json" },
      body: JSON.stringify({ moment: name(row), decision }),
    }).catch(() => null);
    if (!answer || !answer.ok) {
      count.textContent = `The decision was not kept: ${answer ? await answer.text() : "the server is away"}`;
      return;
    }
    decided[name(row)] = decision;
    show();
    if (decision && rows[chosen] === row && chosen + 1 < rows.length) choose(chosen + 1);
  };
  const play = () => video && !video.hidden && (video.paused ? video.play().catch(() => {}) : video.pause());
  const keys = {
    j: () => choose(chosen + 1), k: () => choose(chosen - 1),
    a: () => decide("accept"), r: () => decide("reject"), u: () => decide(""),
    " ": play, e: () => location.assign(root.dataset.export), n: () => root.querySelector("a[rel=next]")?.click(),
  };
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys)) return;
    if (event.target.closest("input, textarea, select, video") || (event.key === " " && event.target.closest("button, a, summary"))) return;
    event.preventDefault();
    keys[event.key]();
  });
  for (const button of root.querySelectorAll("button[data-key]")) button.addEventListener("click", () => keys[button.dataset.key]());
  rows.forEach((row, i) => row.addEventListener("click", (event) => event.isTrusted && choose(i)));
  show();
}
