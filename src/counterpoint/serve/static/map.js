"use strict";
// Draw a sample of embeddings as points; a lasso chooses points, and a label is kept for them.
for (const root of document.querySelectorAll(".map")) {
  const canvas = root.querySelector("canvas"), context = canvas.getContext("2d");
  const status = root.querySelector("[data-status]"), card = root.querySelector("[data-card]");
  const form = root.querySelector("[data-label-form]"), give = root.querySelector("[data-give]"), clear = root.querySelector("[data-clear]");
  const colours = root.querySelector("[data-colours]"), legend = root.querySelector(".groups");
  const token = document.querySelector('meta[name="form-token"]').content;
  let data = null, groups = [], titles = [], chosen = new Set(), lasso = null, near = -1, told = 0;

  const palette = () => {
    const style = getComputedStyle(document.documentElement);
    return ["--s1", "--s2", "--s3", "--s4", "--s5", "--s6"].map((name) => style.getPropertyValue(name).trim()).concat(style.getPropertyValue("--ink").trim(), style.getPropertyValue("--soft").trim());
  };
  let paint = palette();
  // The first six groups are dots, the next ones squares. What has no colour of its own is grey.
  const look = (group) => (titles[group] === "without a label" || /^\d+ others$/.test(titles[group]) ? [paint[7], "dot", 0.35] : [paint[group % 6], group % 12 < 6 ? "dot" : "square", 0.75]);
  const mark = (target, kind, x, y, size) => {
    if (kind === "square") target.fillRect(x - size, y - size, 2 * size, 2 * size);
    else {
      target.beginPath();
      target.arc(x, y, size, 0, 7);
      target.fill();
    }
  };
  const place = () => {
    const width = canvas.clientWidth, height = canvas.clientHeight, edge = 18;
    let right = 1, top = 1;
    for (let i = 0; i < data.x.length; i++) {
      right = Math.max(right, data.x[i]);
      top = Math.max(top, data.y[i]);
    }
    const zoom = Math.min((width - 2 * edge) / right, (height - 2 * edge) / top);
    const left = (width - zoom * right) / 2, up = (height - zoom * top) / 2;
    data.px = data.x.map((x) => left + zoom * x);
    data.py = data.y.map((y) => height - up - zoom * y);
  };
  const draw = () => {
    const ratio = devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
      if (data) place();
    }
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    if (!data) return;
    const size = data.x.length > 5000 ? 1.6 : data.x.length > 800 ? 2.4 : 3.6;
    for (let group = titles.length - 1; group >= 0; group--) {
      const [colour, kind, alpha] = look(group);
      context.fillStyle = colour;
      context.globalAlpha = alpha;
      for (let i = 0; i < groups.length; i++) if (groups[i] === group) mark(context, kind, data.px[i], data.py[i], size);
    }
    context.globalAlpha = 1;
    if (chosen.size) {
      context.fillStyle = paint[6];
      for (const i of chosen) mark(context, "dot", data.px[i], data.py[i], size + 0.6);
    }
    if (near >= 0) {
      context.strokeStyle = paint[6];
      context.lineWidth = 2;
      context.beginPath();
      context.arc(data.px[near], data.py[near], size + 5, 0, 7);
      context.stroke();
    }
    if (lasso) {
      context.strokeStyle = paint[6];
      context.lineWidth = 1.5;
      context.setLineDash([5, 4]);
      context.beginPath();
      lasso.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
      context.closePath();
      context.stroke();
      context.setLineDash([]);
    }
  };
  const said = (extra = "") => {
    const shown = data.x.length < data.total ? `${data.x.length.toLocaleString("en")} of ${data.total.toLocaleString("en")} items, a random sample` : `${data.total.toLocaleString("en")} items`;
    const share = data.share.map((value) => `${Math.round(100 * value)} %`).join(" and ");
    status.textContent = `${shown}, on their two main axes (${share} of the variance). ${chosen.size ? `${chosen.size.toLocaleString("en")} chosen. ` : ""}${extra}`;
    give.disabled = clear.disabled = !chosen.size;
    give.textContent = chosen.size ? `Label ${chosen.size.toLocaleString("en")} point${chosen.size > 1 ? "s" : ""}` : "Label";
  };
  const regroup = () => {
    if (colours.value === "mine") {
      const counts = new Map();
      for (const name of Object.values(data.given)) counts.set(name, (counts.get(name) || 0) + 1);
      titles = [...counts.keys()].sort((a, b) => counts.get(b) - counts.get(a)).concat("without a label");
      const number = new Map(titles.map((name, i) => [name, i]));
      groups = data.rows.map((_, i) => number.get(i in data.given ? data.given[i] : "without a label"));
    } else [titles, groups] = [data.titles, data.groups];
    legend.replaceChildren(
      ...titles.map((name, group) => {
        const item = document.createElement("li"), sign = document.createElement("canvas");
        sign.width = sign.height = 28;
        const [colour, kind] = look(group), target = sign.getContext("2d");
        target.fillStyle = colour;
        mark(target, kind, 14, 14, 9);
        item.append(sign, name);
        return item;
      }),
    );
    const known = root.querySelector("datalist");
    known.replaceChildren(...[...new Set(Object.values(data.given))].sort().map((name) => Object.assign(document.createElement("option"), { value: name })));
    draw();
  };
  const inside = (x, y, path) => {
    let odd = false;
    for (let i = 0, j = path.length - 1; i < path.length; j = i++) {
      const [ax, ay] = path[i], [bx, by] = path[j];
      if (ay > y !== by > y && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) odd = !odd;
    }
    return odd;
  };
  const spot = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  const describe = async (i) => {
    const mine = ++told;
    const answer = await fetch(`${root.dataset.item}&row=${data.rows[i]}`).catch(() => null);
    if (!answer || !answer.ok || mine !== told) return;
    const about = await answer.json();
    const parts = [];
    for (const [name, kind] of Object.entries(about.shown)) {
      const source = `${root.dataset.picture}${encodeURIComponent(about.split)}/${about.item}/${encodeURIComponent(name)}?in=${encodeURIComponent(root.dataset.in)}`;
      const part = document.createElement(kind === "image" ? "img" : "audio");
      if (kind === "audio") Object.assign(part, { controls: true, preload: "none" });
      else part.alt = `${name} of ${about.name}`;
      part.src = source;
      parts.push(part);
    }
    const line = (text) => parts.push(Object.assign(document.createElement("p"), { textContent: text }));
    Object.values(about.texts).forEach(line);
    line([about.name, about.label, i in data.given ? `labelled ${data.given[i]}` : ""].filter(Boolean).join(" · "));
    card.replaceChildren(...parts);
    card.hidden = false;
  };
  let waiting = 0;
  const point = (x, y) => {
    let best = -1, least = 144;
    for (let i = 0; i < data.px.length; i++) {
      const far = (data.px[i] - x) ** 2 + (data.py[i] - y) ** 2;
      if (far < least) [best, least] = [i, far];
    }
    if (best === near) return;
    near = best;
    draw();
    clearTimeout(waiting);
    if (near >= 0) waiting = setTimeout(() => describe(near), 120);
  };
  canvas.addEventListener("pointerdown", (event) => {
    if (!data || event.button !== 0) return;
    canvas.setPointerCapture(event.pointerId);
    lasso = [spot(event)];
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!data) return;
    if (!lasso) return point(...spot(event));
    lasso.push(spot(event));
    draw();
  });
  canvas.addEventListener("pointerup", (event) => {
    if (!lasso) return;
    const path = lasso;
    lasso = null;
    if (!event.shiftKey) chosen = new Set();
    if (path.length > 2) for (let i = 0; i < data.px.length; i++) if (inside(data.px[i], data.py[i], path)) chosen.add(i);
    if (path.length < 4) point(...spot(event));
    if (path.length < 4 && near >= 0) chosen.add(near);
    said();
    draw();
    if (chosen.size) form.elements.label.focus({ preventScroll: true });
  });
  canvas.addEventListener("pointercancel", () => ((lasso = null), draw()));
  canvas.addEventListener("pointerleave", () => ((near = -1), data && draw()));
  const none = () => {
    chosen = new Set();
    said();
    draw();
  };
  clear.addEventListener("click", none);
  addEventListener("keydown", (event) => event.key === "Escape" && data && none());
  colours.addEventListener("change", regroup);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const label = form.elements.label.value.trim(), points = [...chosen];
    const answer = await fetch(root.dataset.label, {
      method: "POST",
      headers: { "content-type": "application/json", "x-form-token": token, accept: "application/json" },
      body: JSON.stringify({ rows: points.map((i) => data.rows[i]), label }),
    }).catch(() => null);
    if (!answer || !answer.ok) return said(`The label was not kept: ${answer ? await answer.text() : "the server is away"}`);
    const kept = await answer.json();
    for (const i of points) if (label) data.given[i] = label;
      else delete data.given[i];
    chosen = new Set();
    form.elements.label.value = "";
    colours.value = "mine";
    regroup();
    said(label ? `${kept.labelled} items are labelled “${label}” in ${kept.file}.` : `${kept.labelled} items have no label now.`);
  });
  const repaint = () => {
    paint = palette();
    if (data) regroup();
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  new ResizeObserver(() => draw()).observe(canvas);
  (async () => {
    // A million embeddings take seconds to read: show that time passes.
    const begun = Date.now(), first = status.textContent;
    const clock = setInterval(() => (status.textContent = `${first} ${Math.round((Date.now() - begun) / 1000)} s`), 1000);
    const answer = await fetch(root.dataset.points, { headers: { accept: "application/json" } }).catch(() => null);
    clearInterval(clock);
    if (!answer || !answer.ok) {
      status.textContent = answer ? await answer.text() : "The server is away; reload the page.";
      return;
    }
    data = await answer.json();
    canvas.width = 0; // place the points at the next drawing
    said();
    regroup();
    root.dataset.ready = "1";
  })();
}
