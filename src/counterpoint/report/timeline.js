"use strict";
// Makes every drawn timeline follow its video: hovering shows scores, clicking seeks, a playhead runs along.
for (const root of document.querySelectorAll(".timeline")) {
  const data = JSON.parse(root.querySelector('script[type="application/json"]').textContent);
  const plot = root.querySelector(".plot"), video = root.querySelector("video");
  const playhead = root.querySelector(".playhead"), crosshair = root.querySelector(".crosshair");
  const tip = root.querySelector(".tip");
  const rows = [...root.querySelectorAll("tr[data-seek]")];
  let now = 0;

  const clock = (seconds) => {
    const tenths = Math.round(Math.max(0, seconds) * 10);
    const minutes = Math.floor(tenths / 600), hours = Math.floor(minutes / 60);
    const rest = String(Math.floor((tenths % 600) / 10)).padStart(2, "0") + "." + (tenths % 10);
    return hours ? `${hours}:${String(minutes % 60).padStart(2, "0")}:${rest}` : `${minutes}:${rest}`;
  };
  const snippet = (t) => Math.min(data.fused.length - 1, Math.max(0, Math.floor(t / data.snippet + 1e-6)));
  const score = (values, i) => (values[i] === null || values[i] === undefined ? "–" : (values[i] / 1000).toFixed(2));
  const told = (t) => data.streams.map(([key, label]) => `${label} ${score(data[key], snippet(t))}`);

  const show = (t) => {
    now = t;
    playhead.hidden = false;
    playhead.style.left = `${(100 * t) / data.duration}%`;
    plot.setAttribute("aria-valuenow", t.toFixed(1));
    plot.setAttribute("aria-valuetext", `${clock(t)}, ${told(t).join(", ")}`);
    for (const row of rows) row.classList.toggle("now", t >= +row.dataset.seek && t < +row.dataset.end);
  };
  const seek = (t) => {
    t = Math.min(data.duration, Math.max(0, t));
    // The end itself is not a frame; players show black or rewind there.
    if (video) video.currentTime = Math.min(t, Math.max(0, (video.duration || data.duration) - 0.05));
    show(t);
  };

  const at = (event) => {
    const box = plot.getBoundingClientRect();
    return (data.duration * Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)));
  };
  const hover = (event) => {
    const t = at(event), share = t / data.duration;
    crosshair.hidden = tip.hidden = false;
    crosshair.style.left = `${100 * share}%`;
    tip.replaceChildren();
    const head = document.createElement("b");
    head.textContent = clock(t);
    tip.append(head, ...told(t).flatMap((line, i) => (i ? [document.createElement("br"), line] : [line])));
    const width = plot.clientWidth, x = share * width;
    tip.style.left = `${x + 12 + tip.offsetWidth > width ? Math.max(0, x - 12 - tip.offsetWidth) : x + 12}px`;
  };
  let dragging = false;
  plot.addEventListener("pointermove", (event) => {
    hover(event);
    if (dragging) seek(at(event));
  });
  plot.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    dragging = true;
    plot.setPointerCapture(event.pointerId);
    seek(at(event));
  });
  for (const end of ["pointerup", "pointercancel"]) plot.addEventListener(end, () => (dragging = false));
  plot.addEventListener("pointerleave", () => (crosshair.hidden = tip.hidden = true));

  const play = () => video && (video.paused ? video.play().catch(() => {}) : video.pause());
  plot.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = data.snippet * (event.shiftKey ? 10 : 1);
    const keys = {
      ArrowRight: () => seek(now + step), ArrowUp: () => seek(now + step),
      ArrowLeft: () => seek(now - step), ArrowDown: () => seek(now - step),
      PageUp: () => seek(now + 10 * data.snippet), PageDown: () => seek(now - 10 * data.snippet),
      Home: () => seek(0), End: () => seek(data.duration), " ": play, Enter: play,
    };
    if (!(event.key in keys)) return;
    event.preventDefault();
    keys[event.key]();
  });

  root.addEventListener("click", (event) => {
    const target = event.target.closest("[data-seek]");
    if (!target) return;
    seek(+target.dataset.seek);
    // What was asked for should be seen: bring the picture, or without one the curve, into view.
    (video && !video.hidden ? video : plot).scrollIntoView({ block: "nearest" });
  });

  if (video) {
    video.addEventListener("timeupdate", () => show(video.currentTime));
    const follow = () => {
      show(video.currentTime);
      if (!video.paused && !video.ended) requestAnimationFrame(follow);
    };
    video.addEventListener("play", follow);
    const unplayable = () => {
      video.hidden = true;
      root.querySelector("[data-unplayable]").hidden = false;
    };
    video.addEventListener("error", unplayable);
    // The file may have failed before this script ran; and without a picture track videoWidth stays 0.
    if (video.error) unplayable();
    video.addEventListener("loadedmetadata", () => video.videoWidth || unplayable());
  }
}
