"use strict";
// Keep a part of a page current while a training writes; reload a list that is still being read.
for (const part of document.querySelectorAll("[data-live]")) {
  const wait = 1000 * Number(part.dataset.every);
  const end = (log) => log && (log.scrollTop = log.scrollHeight);
  const ask = async () => {
    let again = true;
    try {
      const answer = await fetch(`${part.dataset.live}?stamp=${encodeURIComponent(part.dataset.stamp)}`);
      if (answer.status === 200) {
        const log = part.querySelector("pre.log");
        const followed = !log || log.scrollTop + log.clientHeight > log.scrollHeight - 40;
        const place = log ? log.scrollTop : 0;
        part.innerHTML = await answer.text(); // the server escaped it
        const now = part.querySelector("pre.log");
        if (followed) end(now);
        else if (now) now.scrollTop = place;
      }
      if (answer.ok) {
        part.dataset.stamp = answer.headers.get("x-stamp");
        again = !answer.headers.has("x-done");
      }
    } catch {
      // The server is away for a moment, or for good: ask again later.
    }
    if (again) setTimeout(ask, document.hidden ? 5 * wait : wait);
  };
  end(part.querySelector("pre.log"));
  setTimeout(ask, wait);
}
const reading = document.querySelector("[data-reload]");
if (reading) {
  // Not while the reader leaves, types or chooses.
  let leaving = false;
  addEventListener("beforeunload", () => (leaving = true));
  setInterval(() => {
    const busy = document.activeElement?.matches("input, select") || document.querySelector("input:checked");
    if (!leaving && !busy) location.reload();
  }, 1000 * Number(reading.dataset.reload));
}
