"use strict";
// The address determines the whole page: ?q=TEXT&show=WHICH&sort=ORDER&page=NUMBER#LATENT. Text is only ever set as
// textContent. `about` is the summary of all latents; `latents[FILE]` has the details once that file is loaded.
window.latents = {};
const about = window.about, width = about.count.length, PER_PAGE = 100, MOST_FOUND = 200;
const query = new URLSearchParams(location.search), asked = (query.get("q") || "").trim();
const dense = new Set(about.dense);
const place = id => document.getElementById(id);
let shownLatent = null;

function element(tag, content, className) {
  const made = document.createElement(tag);
  for (const part of [content].flat()) made.append(part instanceof Node ? part : String(part));
  if (className) made.className = className;
  return made;
}
const link = (address, content) => Object.assign(element("a", content), {href: address});
const visible = text => text.replace(/\n/g, "↵").replace(/\t/g, "⇥");
const number = value => Math.abs(value) >= 1e5 ? value.toExponential(2) : String(+value.toPrecision(3));
const percent = latent => number(100 * about.count[latent] / Math.max(about.activations, 1)) + "%";

// Returns a file of latents, and loads it the first time.
function load(file) {
  return new Promise((resolve, reject) => {
    if (window.latents[file]) return resolve(window.latents[file]);
    const script = document.createElement("script");
    script.src = `data/latents_${file}.js`;
    script.onload = () => { script.remove(); resolve(window.latents[file]); };
    script.onerror = () => reject(new Error(`cannot read ${script.src}`));
    document.head.append(script);
  });
}

const WHICH = {
  all: () => true, alive: i => about.count[i] > 0, dead: i => about.count[i] === 0, dense: i => dense.has(i),
};
// How well a latent matches the search, by latent; see `search`.
const relevance = new Map();
const ORDERS = {
  relevance: (a, b) => relevance.get(b) - relevance.get(a) || a - b, number: (a, b) => a - b,
  frequency: (a, b) => about.count[b] - about.count[a] || a - b,
  rare: (a, b) => about.count[a] - about.count[b] || a - b, max: (a, b) => about.max[b] - about.max[a] || a - b,
};
const chosen = (name, of) => Object.hasOwn(of, query.get(name)) ? query.get(name) : Object.keys(of)[0];
const show = chosen("show", WHICH), sort = chosen("sort", ORDERS);

function row(latent, reason) {
  const made = element("tr", [
    element("td", link("#" + latent, latent)), element("td", percent(latent)), element("td", number(about.max[latent])),
    element("td", visible(reason)),
  ]);
  made.dataset.latent = latent;
  if (latent === shownLatent) made.className = "chosen";
  return made;
}

const peaksOf = latent => about.peaks[latent].slice(0, 3).map(t => JSON.stringify(about.tokens[t])).join(" ");

function list() {
  const found = [];
  for (let i = 0; i < width; i++) if (WHICH[show](i)) found.push(i);
  found.sort(ORDERS[sort]);
  const last = Math.max(Math.ceil(found.length / PER_PAGE) - 1, 0);
  const at = Math.min(Math.max(Number(query.get("page")) || 0, 0), last);
  place("rows").append(...found.slice(at * PER_PAGE, (at + 1) * PER_PAGE).map(i => row(i, peaksOf(i))));
  place("status").textContent = `${found.length.toLocaleString("en")} latents`;
  const turn = (to, content) => {
    const address = new URLSearchParams(query);
    address.set("page", to);
    place("pages").append(link("?" + address, content), " ");
  };
  if (at > 0) turn(at - 1, "← previous");
  if (at < last) turn(at + 1, "next →");
  return found[at * PER_PAGE];
}

// The passage of a latent on whose text in lower case it fires most: [share of its maximum, the passage's text, the
// place of the wanted text in it]; undefined if no passage has the text.
function bestPassage(latent, number, tokens, wanted) {
  let best;
  for (const [, , passage, values] of [...latent.top, ...latent.bands]) {
    const texts = passage.map(t => tokens[t]), text = texts.join("");
    for (let at = text.toLowerCase().indexOf(wanted); at >= 0; at = text.toLowerCase().indexOf(wanted, at + 1)) {
      let start = 0, largest = 0;
      texts.forEach((token, i) => {
        if (start < at + wanted.length && start + token.length > at) largest = Math.max(largest, values[i]);
        start += token.length;
      });
      const share = largest / about.max[number];
      if (!best || share > best[0]) best = [share, text, at];
    }
  }
  return best;
}

// Searches latents by number, by token in the index, and by the text of passages, for which it reads every file.
// The relevance is 3 for the number; 2 to 3 for a token at the peaks of the strongest passages, more if more of them
// have it; 1 to 2 for a token that is raised, more if it is raised more; and 0 to 1 for a passage, more if the latent
// fires more on the text itself.
async function search() {
  const wanted = asked.toLowerCase(), reasons = new Map();
  const add = (latent, value, reason) => {
    if (!WHICH[show](latent) || relevance.get(latent) >= value) return;
    relevance.set(latent, value);
    reasons.set(latent, reason);
  };
  const listFound = () => {
    const found = [...reasons.keys()].sort(ORDERS.relevance).slice(0, MOST_FOUND).sort(ORDERS[sort]);
    document.querySelectorAll("#rows tr[data-latent]").forEach(old => old.remove());
    place("rows").append(...found.map(i => row(i, reasons.get(i))));
    return found[0];
  };
  if (/^\d+$/.test(asked) && +asked < width) add(+asked, 3, "latent number");
  const same = new Set(about.tokens.flatMap((text, t) => text.trim().toLowerCase() === wanted ? [t] : []));
  const byToken = (tokens, least, reason) => {
    for (let i = 0; i < width && same.size; i++) {
      const at = tokens[i].findIndex(t => same.has(t));
      if (at >= 0) add(i, least + 1 / (at + 2), `${reason} ${JSON.stringify(about.tokens[tokens[i][at]])}`);
    }
  };
  byToken(about.peaks, 2, "fires on");
  if (about.raises) byToken(about.raises, 1, "raises");
  openFirst(listFound());
  // No passage is more relevant than a token.
  const files = reasons.size < MOST_FOUND ? Math.ceil(width / about.per_file) : 0;
  for (let file = 0, listed = performance.now(); file < files; file++) {
    const {tokens, latents} = await load(file);
    latents.forEach((latent, i) => {
      const number = file * about.per_file + i, best = bestPassage(latent, number, tokens, wanted);
      if (!best) return;
      const [share, text, at] = best;
      add(number, share, "…" + text.slice(Math.max(at - 10, 0), at + wanted.length + 10) + "…");
    });
    if (file !== Math.floor(shownLatent / about.per_file)) delete window.latents[file];
    if (performance.now() > listed + 500) {
      listFound();
      listed = performance.now();
    }
    const read = Math.min((file + 1) * about.per_file, width).toLocaleString("en");
    place("status").textContent =
      `${reasons.size} found; passages of ${read} of ${width.toLocaleString("en")} latents searched`;
  }
  openFirst(listFound());
  if (reasons.size > MOST_FOUND) place("status").textContent = `the ${MOST_FOUND} best of ${reasons.size} matches`;
}

function histogram([first, ...counts]) {
  const [lowest, perOctave] = about.histogram, most = Math.max(...counts), WIDE = 14, HIGH = 90;
  const make = (tag, attributes, content) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (content !== undefined) made.append(content);
    return made;
  };
  const edge = bin => number(2 ** (lowest + bin / perOctave));
  const drawn = make("svg", {width: Math.max(counts.length * WIDE, 160) + 40, height: HIGH + 22});
  counts.forEach((count, i) => {
    const high = count && Math.max(HIGH * count / most, 1);
    const bar = make("rect", {x: i * WIDE, y: HIGH - high, width: WIDE - 2, height: high});
    bar.append(make("title", {},
      `activation ${edge(first + i)} to ${edge(first + i + 1)}: ${count.toLocaleString("en")} firings`));
    drawn.append(bar);
    if (i % 6 === 0) drawn.append(make("text", {x: i * WIDE, y: HIGH + 14}, edge(first + i)));
  });
  return drawn;
}

function passage([row, peak, tokens, values], texts, largest) {
  const made = element("div", element("span", number(values[peak]), "value"), "passage");
  tokens.forEach((t, i) => {
    const token = element("span", visible(texts[t]));
    if (values[i] > 0) {
      token.style.background = `rgba(30,142,62,${(0.1 + 0.7 * Math.min(values[i] / largest, 1)).toFixed(2)})`;
      token.title = number(values[i]);
    }
    if (i === peak) token.className = "peak";
    made.append(token);
  });
  made.title = `row ${row}`;
  return made;
}

function table(title, rows) {
  const made = element("table", rows.map(cells => element("tr", cells.map(cell => element("td", cell)))));
  return element("div", [element("h2", title), element("div", made, "wide")]);
}

async function showLatent(latent) {
  shownLatent = latent;
  document.querySelectorAll("#rows tr").forEach(r => r.classList.toggle("chosen", +r.dataset.latent === latent));
  const {tokens, latents} = await load(Math.floor(latent / about.per_file));
  if (shownLatent !== latent) return;
  const data = latents[latent % about.per_file], largest = about.max[latent], target = place("latent");
  const kind = about.count[latent] ? (dense.has(latent) ? " (dense)" : "") : " (never fired)";
  const move = [latent - 1, latent + 1].filter(i => i >= 0 && i < width);
  target.replaceChildren(
    element("h2", [`Latent ${latent}${kind} `, ...move.map(i => link("#" + i, i < latent ? "← " : " →"))]));
  if (about.count[latent]) {
    const share = `${percent(latent)} of activations (${about.count[latent].toLocaleString("en")})`;
    const size = `mean ${number(data.mean)}, maximum ${number(largest)}`;
    target.append(element("p",
      `Fires on ${share}. Activation where it fires: ${size}. The histogram counts its firings by activation.`),
      element("div", histogram(data.histogram), "wide"));
  }
  const columns = element("div", [], "columns");
  const words = pairs => pairs.map(([t, value]) => [element("span", visible(tokens[t]), "token"), number(value)]);
  if (data.up) columns.append(table("Raises (logit)", words(data.up)), table("Lowers (logit)", words(data.down)));
  columns.append(table("Nearest decoders (cosine)",
    data.nearest.map(([i, cosine]) => [link("#" + i, i), cosine.toFixed(2)])));
  target.append(columns);
  if (!data.top.length) return;
  target.append(element("h2", "Strongest firings, with activations"), ...data.top.map(p => passage(p, tokens, largest)));
  target.append(element("h2", "One firing from each fifth of a sample, strongest fifth first"),
    ...data.bands.map(p => passage(p, tokens, largest)));
}

function failed(error) { place("status").textContent = error.message; }
function openHash() {
  const text = location.hash.slice(1);
  if (!/^\d+$/.test(text)) return;
  if (+text < width) showLatent(+text).catch(failed);
  else failed(new Error(`there is no latent ${text}; latents are 0 to ${(width - 1).toLocaleString("en")}`));
}
function openFirst(latent) { if (shownLatent === null && latent !== undefined) showLatent(latent).catch(failed); }

const reads = about.site === about.target_site ? about.site : `${about.site} to ${about.target_site}`;
place("about").textContent = `${about.model}, ${reads}: ${width.toLocaleString("en")} latents on ` +
  `${about.activations.toLocaleString("en")} activations, ${about.rows.toLocaleString("en")} rows of ${about.text}.` +
  (about.raises ? "" : " The SAE's output is not added to the residual stream, so no logits are shown.");
const form = document.querySelector("form");
form.q.value = asked; form.show.value = show; form.sort.value = sort;
const sorted = (by, content) => {
  const address = new URLSearchParams(query);
  address.delete("page");
  address.set("sort", by);
  return link("?" + address, content);
};
place("rows").append(element("tr", [
  sorted("number", "latent"), sorted("frequency", "frequency"), sorted("max", "max activation"),
  asked ? "found by" : "fires most on",
].map(heading => element("th", heading))));
window.addEventListener("hashchange", openHash);
openHash();
if (asked) search().catch(failed); else openFirst(list());
