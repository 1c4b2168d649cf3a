"use strict";
(() => {
  // A row of the image is shaded by the parts over it, on a scale of this pair. `edges` has the top
  // and bottom of the parts of each group.
  function shade(face, parts, edges) {
    const cuts = [...new Set([0, 1, ...Object.values(edges).flat(2)])].sort((a, b) => a - b);
    const bands = cuts.slice(1).map((bottom, i) => ({ top: cuts[i], bottom }));
    for (const band of bands) {
      const middle = (band.top + band.bottom) / 2;
      band.heat = Object.entries(parts).reduce((sum, [group, values]) => {
        const over = values.filter((_, i) => edges[group][i][0] < middle && middle < edges[group][i][1]);
        return sum + over.reduce((a, b) => a + b, 0) / Math.max(over.length, 1);
      }, 0);
    }
    const heats = bands.map((band) => band.heat);
    const least = Math.min(...heats);
    const range = Math.max(...heats) - least || 1;
    face.querySelectorAll("u").forEach((old) => old.remove());
    for (const { top, bottom, heat } of bands) {
      const band = document.createElement("u");
      band.style.top = `${100 * top}%`;
      band.style.height = `${100 * (bottom - top)}%`;
      band.style.opacity = (0.65 * (heat - least)) / range;
      face.append(band);
    }
  }

  const findEdges = (element) => JSON.parse(element.closest("[data-edges]").dataset.edges);

  function fill(panel, query, button) {
    const parts = JSON.parse(button.dataset.parts);
    const find = (role) => panel.querySelector(`[data-role="${role}"]`);
    for (const [role, source] of [["query", query], ["gallery", button]]) {
      find(role).replaceChildren(source.querySelector("img, .absent").cloneNode(true));
    }
    const all = Object.values(parts).flat();
    const most = Math.max(...all) || 1;
    const queryName = query.querySelector("img, .absent");
    find("names").textContent = `${queryName.alt || queryName.textContent} and ${button.dataset.name}`;
    find("caption").textContent = button.dataset.caption;
    find("total").textContent = all.reduce((a, b) => a + b, 0).toFixed(4);
    find("levels").replaceChildren(...Object.entries(parts).map(([group, values], index) => {
      const block = document.createElement("div");
      block.className = "level";
      const title = document.createElement("h4");
      const sum = document.createElement("span");
      sum.textContent = values.reduce((a, b) => a + b, 0).toFixed(4);
      title.append(`${group} `, sum);
      block.append(title, ...values.map((part, i) => {
        const bar = document.createElement("div");
        bar.className = "bar";
        bar.dataset.group = index;
        const [number, body, value] = ["span", "i", "em"].map((tag) => document.createElement(tag));
        number.textContent = i + 1;
        body.style.width = `${(85 * part) / most}%`;
        value.textContent = part.toFixed(4);
        bar.append(number, body, value);
        return bar;
      }));
      return block;
    }));
    shade(find("gallery"), parts, findEdges(button));
  }

  for (const card of document.querySelectorAll(".pair-card")) {
    shade(card.querySelector('[data-role="gallery"]'), JSON.parse(card.dataset.parts), findEdges(card));
  }
  // On the document: lists may come and go.
  document.addEventListener("click", ({ target }) => {
    const dialog = document.getElementById("pair-dialog");
    const button = target.closest(".ranking button");
    if (button) {
      fill(dialog.querySelector(".pair"), button.closest(".query").querySelector(".probe"), button);
      dialog.showModal();
    } else if (dialog && (target === dialog || target.closest("#pair-dialog .close"))) {
      dialog.close();
    }
  });
})();
