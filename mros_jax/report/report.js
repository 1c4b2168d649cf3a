"use strict";
(() => {
  const overlapping = {{ (run.config.network.overlap) | tojson }};

  // A basic stripe is shaded by the windows over it, on a scale of this pair.
  function shade(face, stripes) {
    const levels = Object.values(stripes);
    const windows = levels[0].map((_, i) => levels.reduce((sum, parts) => sum + parts[i], 0));
    const count = windows.length + (overlapping ? 1 : 0);
    const heat = Array.from({ length: count }, (_, i) => {
      const over = overlapping ? [windows[i - 1], windows[i]] : [windows[i]];
      const there = over.filter((value) => value !== undefined);
      return there.reduce((a, b) => a + b, 0) / there.length;
    });
    const least = Math.min(...heat);
    const range = Math.max(...heat) - least || 1;
    face.querySelectorAll("u").forEach((old) => old.remove());
    heat.forEach((value, i) => {
      const band = document.createElement("u");
      band.style.top = `${(100 * i) / count}%`;
      band.style.height = `${100 / count}%`;
      band.style.opacity = (0.65 * (value - least)) / range;
      face.append(band);
    });
  }

  function fill(panel, query, button) {
    const stripes = JSON.parse(button.dataset.stripes);
    const find = (role) => panel.querySelector(`[data-role="${role}"]`);
    for (const [role, source] of [["query", query], ["gallery", button]]) {
      find(role).replaceChildren(source.querySelector("img, .absent").cloneNode(true));
    }
    const all = Object.values(stripes).flat();
    const most = Math.max(...all) || 1;
    const queryName = query.querySelector("img, .absent");
    find("names").textContent = `${queryName.alt || queryName.textContent} and ${button.dataset.name}`;
    find("caption").textContent = button.dataset.caption;
    find("total").textContent = all.reduce((a, b) => a + b, 0).toFixed(4);
    find("levels").replaceChildren(...Object.entries(stripes).map(([level, parts]) => {
      const block = document.createElement("div");
      block.className = "level";
      const title = document.createElement("h4");
      const sum = document.createElement("span");
      sum.textContent = parts.reduce((a, b) => a + b, 0).toFixed(4);
      title.append(`${level.toUpperCase()} `, sum);
      block.append(title, ...parts.map((part, i) => {
        const bar = document.createElement("div");
        bar.className = `bar ${level}`;
        const [number, body, value] = ["span", "i", "em"].map((tag) => document.createElement(tag));
        number.textContent = i + 1;
        body.style.width = `${(85 * part) / most}%`;
        value.textContent = part.toFixed(4);
        bar.append(number, body, value);
        return bar;
      }));
      return block;
    }));
    shade(find("gallery"), stripes);
  }

  for (const card of document.querySelectorAll(".pair-card")) {
    shade(card.querySelector('[data-role="gallery"]'), JSON.parse(card.dataset.stripes));
  }
  const dialog = document.getElementById("pair-dialog");
  const template = document.querySelector(".pair");
  for (const button of document.querySelectorAll(".ranking button")) {
    button.addEventListener("click", () => {
      const panel = template.cloneNode(true);
      fill(panel, button.closest(".query").querySelector(".probe"), button);
      dialog.querySelector(".slot").replaceChildren(panel);
      dialog.showModal();
    });
  }
  dialog.querySelector(".close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
})();
