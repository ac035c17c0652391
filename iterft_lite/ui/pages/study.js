"use strict";
// Everything that models, judges and files wrote goes into the page as text (textContent), never as markup.
const study = JSON.parse(document.getElementById("study").textContent);
const SHOWN = 2, LEFT = 30, TOP = 8, SIDE = 190, GAP = 12, STRIP = 44, RIGHT = 10, BELOW = 18;
const DASHES = ["", "7 2", "2 2", "7 2 2 2", "4 2 1 2 1 2", "10 3", "1 3"];

function make(name, attributes, ...inside) {
  const svg = ["svg", "g", "path", "line", "circle", "polygon", "text", "title"].includes(name);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  for (const each of inside) made.append(each);
  return made;
}

// -- curves

const cycles = Math.max(1, ...study.experiments.map(each => each.cycles));
const across = cycle => LEFT + 8 + cycle / cycles * (SIDE - 16);
const up = score => TOP + (104 - score) / 108 * SIDE;
const below = score => TOP + SIDE + GAP + (104 - score) / 108 * STRIP;

function shade(place, count) {
  const share = count < 2 ? 100 : 42 + 58 * place / (count - 1);
  return `color-mix(in srgb, var(--trait) ${share}%, var(--back))`;
}

function path(points, height) {
  return points.map(([cycle, score], at) => `${at ? "L" : "M"}${across(cycle).toFixed(1)} ${height(score).toFixed(1)}`).join("");
}

function marker(number, x, y, colour) {
  const r = 3.4, at = pairs => pairs.map(([a, b]) => `${(x + a * r).toFixed(1)},${(y + b * r).toFixed(1)}`).join(" ");
  const shapes = [null, [[-.9, -.9], [.9, -.9], [.9, .9], [-.9, .9]], [[0, -1.2], [1.1, .9], [-1.1, .9]], [[0, -1.3], [1.3, 0], [0, 1.3], [-1.3, 0]],
                  [[-1.1, -.9], [1.1, -.9], [0, 1.2]]];
  const shape = shapes[number % shapes.length];
  const made = shape ? make("polygon", {points: at(shape)}) : make("circle", {cx: x, cy: y, r});
  made.style.fill = colour;
  return made;
}

function curve(each) {
  const line = study.lines.indexOf(each.line), colour = shade(Math.max(0, line), study.lines.length);
  const scored = each.points.filter(point => point[0] >= 0 && point[1] !== null);
  const made = make("g", {class: "curve", "data-experiment": each.number, tabindex: "0", role: "button", "aria-label": `${each.name}: ${each.verdict}`});
  made.append(make("title", {}, `${each.name}: ${each.verdict}`));
  const banded = scored.filter(point => point[2] !== null);
  if (banded.length) {
    const ends = [...banded.map(p => [p[0], p[3]]), ...banded.slice().reverse().map(p => [p[0], p[2]])];
    const band = make("path", {class: "band", d: path(ends, up) + "Z"});
    band.style.fill = colour;
    made.append(band);
  }
  for (const [points, height, width] of [[scored.map(p => [p[0], p[1]]), up, ""], [each.points.filter(p => p[0] >= 0 && p[4] !== null).map(p => [p[0], p[4]]), below, "1.2"]]) {
    const stroke = make("path", {class: "stroke", d: path(points, height), "stroke-dasharray": DASHES[Math.max(0, line) % DASHES.length]});
    stroke.style.stroke = colour;
    if (width) stroke.style.strokeWidth = width;
    made.append(stroke);
  }
  for (const point of scored) made.append(marker(Math.max(0, line), across(point[0]), up(point[1]), colour));
  const last = scored[scored.length - 1];
  if (last && each.ring) made.append(make("circle", {class: `ring ${each.ring}`, cx: across(last[0]), cy: up(last[1]), r: 8}));
  if (each.ended) {
    const [x, y] = last ? [across(last[0]), up(last[1])] : [across(0), up(2)];
    made.append(make("path", {class: "ended", d: `M${x - 5} ${y - 5}L${x + 5} ${y + 5}M${x - 5} ${y + 5}L${x + 5} ${y - 5}`}));
  }
  return made;
}

function panel(title, shown) {
  const wide = LEFT + SIDE + RIGHT, high = TOP + SIDE + GAP + STRIP + BELOW;
  const drawn = make("svg", {viewBox: `0 0 ${wide} ${high}`, role: "group", "aria-label": title || "curves"});
  for (const score of [0, 25, 50, 75, 100]) {
    drawn.append(make("line", {class: "grid", x1: LEFT, x2: LEFT + SIDE, y1: up(score), y2: up(score)}));
    drawn.append(make("text", {x: LEFT - 5, y: up(score) + 3, "text-anchor": "end"}, String(score)));
  }
  for (const score of [0, 100]) {
    drawn.append(make("line", {class: "grid", x1: LEFT, x2: LEFT + SIDE, y1: below(score), y2: below(score)}));
    drawn.append(make("text", {x: LEFT - 5, y: below(score) + 3, "text-anchor": "end"}, String(score)));
  }
  const every = Math.ceil((cycles + 1) / 12);
  for (let cycle = 0; cycle <= cycles; cycle += every) drawn.append(make("text", {x: across(cycle), y: high - 4, "text-anchor": "middle"}, String(cycle)));
  const untouched = shown.map(each => each.points.find(point => point[0] < 0)).filter(point => point && point[1] !== null).map(point => point[1]);
  if (untouched.length) {
    const y = up(untouched.reduce((a, b) => a + b) / untouched.length);
    drawn.append(make("line", {class: "untouched", x1: LEFT, x2: LEFT + SIDE, y1: y, y2: y}));
  }
  for (const each of shown) drawn.append(curve(each));
  return make("figure", {}, make("figcaption", {}, title), drawn);
}

for (const title of [...new Set(study.experiments.map(each => each.panel))]) {
  document.getElementById("curves").append(panel(title, study.experiments.filter(each => each.panel === title)));
}
if (study.lines.length > 1) {
  const legend = document.getElementById("legend");
  legend.append(make("strong", {}, study.line));
  study.lines.forEach((line, place) => {
    const sample = make("svg", {width: 34, height: 12, "aria-hidden": "true"}), colour = shade(place, study.lines.length);
    const stroke = make("path", {d: "M1 6L33 6", "stroke-width": 2, "stroke-dasharray": DASHES[place % DASHES.length]});
    stroke.style.stroke = colour;
    sample.append(stroke, marker(place, 17, 6, colour));
    legend.append(make("span", {}, sample, line));
  });
}

// -- answers: in this page, or in files beside it that are loaded when they are asked for

const loaded = new Map(), waiting = new Map();
window.iterft = (key, answers) => { loaded.set(key, answers); };

function answersOf(key) {
  if (loaded.has(key)) return Promise.resolve(loaded.get(key));
  const inline = document.getElementById(`answers-${key}`);
  if (inline) {
    loaded.set(key, JSON.parse(inline.textContent));
    return Promise.resolve(loaded.get(key));
  }
  if (!waiting.has(key)) waiting.set(key, new Promise(done => {
    const script = document.createElement("script");
    script.src = `${study.beside}/${key}.js`;
    script.onload = () => done(loaded.get(key) || null);
    script.onerror = () => { waiting.delete(key); done(null); };
    document.head.append(script);
  }));
  return waiting.get(key);
}

function answer([, text, trait, coherence, finish]) {
  const made = make("div", {class: "answer"});
  if (trait !== null) made.append(make("span", {class: "badge trait"}, `trait ${Math.round(trait)}`));
  if (coherence !== null) made.append(make("span", {class: "badge"}, `coherence ${Math.round(coherence)}`));
  if (finish !== "stop") made.append(make("span", {class: "badge"}, "cut"));
  if (made.firstChild) made.append("\n");
  made.append(text || "(an empty answer)");
  return made;
}

function column(title, untouched, found, question) {
  const made = make("div", untouched ? {class: "untouched-model"} : {}, make("h3", {}, title));
  const mine = found ? found.answers.filter(each => found.questions[each[0]] === question) : [];
  if (!found) made.append(make("p", {class: "about"}, "its answers are not there"));
  made.append(...mine.slice(0, SHOWN).map(answer));
  if (mine.length > SHOWN) {
    const more = make("button", {type: "button", class: "more"}, `${mine.length - SHOWN} more`);
    more.onclick = () => more.replaceWith(...mine.slice(SHOWN).map(answer));
    made.append(more);
  }
  return made;
}

const trainings = document.getElementById("training"), questions = document.getElementById("question");
let chosen = null, turn = 0;

function options(select, texts, kept) {
  select.replaceChildren(...texts.map((text, at) => make("option", {value: at}, text)));
  if (kept >= 0 && kept < texts.length) select.value = kept;
}

async function read() {
  const mine = ++turn, cell = chosen.cells[trainings.value || 0];
  const found = await Promise.all(cell.answers.map(([, key]) => answersOf(key)));
  if (mine !== turn) return;  // another was chosen meanwhile
  const asked = [...new Set(found.filter(Boolean).flatMap(each => each.questions))];
  const before = questions.selectedOptions[0] ? questions.selectedOptions[0].textContent : "";
  options(questions, asked, asked.indexOf(before));
  const question = asked[questions.value || 0];
  document.getElementById("reading-about").textContent = [chosen.verdict, cell.state, cell.why].filter(Boolean).join("; ");
  const columns = cell.answers.map(([cycle], at) => column(study.titles[cycle + 1] || `cycle ${cycle}`, cycle < 0, found[at], question));
  document.getElementById("answers").replaceChildren(...columns);
}

function choose(number, scroll) {
  chosen = study.experiments.concat(study.arms).find(each => each.number === number);
  for (const each of document.querySelectorAll("[data-experiment]")) {
    const on = Number(each.dataset.experiment) === number;
    each.classList.toggle(each.classList.contains("cell") ? "chosen" : "on", on);
  }
  document.getElementById("reading").hidden = false;
  document.getElementById("reading-title").textContent = `Answers: ${chosen.name}`;
  options(trainings, chosen.cells.map(cell => cell.name), 0);
  trainings.closest("label").hidden = chosen.cells.length < 2;
  read();
  if (scroll) document.getElementById("reading").scrollIntoView({behavior: "smooth"});
  history.replaceState(null, "", `#${encodeURIComponent(chosen.name)}`);
}

trainings.onchange = questions.onchange = read;
document.addEventListener("click", event => {
  const on = event.target.closest("[data-experiment]");
  if (on) choose(Number(on.dataset.experiment), true);
});
document.addEventListener("keydown", event => {
  const on = event.target.closest && event.target.closest("g[data-experiment]");
  if (on && (event.key === "Enter" || event.key === " ")) { event.preventDefault(); choose(Number(on.dataset.experiment), true); }
});
const wanted = decodeURIComponent(location.hash.slice(1));
const named = study.experiments.concat(study.arms).find(each => each.name === wanted);
if (named) choose(named.number, true);
