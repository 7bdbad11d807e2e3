"use strict";
// The page's own script. Text of tokens and prompts goes into the document as text only, never as markup.
(async () => {
  const byId = (id) => document.getElementById(id);
  const packed = Uint8Array.from(atob(byId("data").textContent), (char) => char.charCodeAt(0));
  const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const data = await new Response(unpacked).json();
  // What is drawn at once: a browser takes seconds for the tokens of a thousand rollouts.
  const LEVELS = 8, DEEPEST = 14, MOST_CHIPS = 6, MOST_LINES = 400, MOST_TOKENS = 20000;
  const state = { prompt: -1, scheme: data.schemes[0].key, row: null, theme: "auto", sort: null, falls: false };

  function make(tag, className, text) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  function put(parent, tag, className, text) {
    return parent.appendChild(make(tag, className, text));
  }

  function number(value) {
    if (value === null || value === undefined) return "none";
    const size = Math.abs(value);
    return (size === 0 || (size >= 1e-3 && size < 1e4) ? value.toFixed(3) : value.toExponential(2)).replace("-", "−");
  }

  const signed = (value) => (value > 0 ? "+" : "") + number(value);
  const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)}%`;
  const many = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

  // ---- a prompt's tree
  function readTree(prompt) {
    const pieces = [];
    let offset = 0;
    prompt.parents.forEach((above, i) => {
      const parent = pieces[above] || null;
      const start = parent ? parent.end : 0;
      const piece = {
        number: i, parent, start, end: start + prompt.lengths[i], offset, isNode: prompt.isNode[i],
        depth: parent ? parent.depth + 1 : -1, rows: [], ending: [], hasChildren: false, isClosed: false, isDrawn: false,
        cells: [], item: make("li"), cached: new Map(),
      };
      if (parent) parent.hasChildren = true;
      offset += prompt.lengths[i];
      pieces.push(piece);
    });
    prompt.at.forEach((at, row) => {
      pieces[at].ending.push(row);
      for (let piece = pieces[at]; piece; piece = piece.parent) piece.rows.push(row);
    });
    const largest = {};
    for (const { key } of data.schemes) {
      largest[key] = 0;
      prompt.credit[key].forEach((index, row) => {
        if (prompt.rewards[row] === null) return;
        const run = prompt.runs[index];
        for (let k = 0; k < run.length; k += 2) {
          if (run[k] > 0) largest[key] = Math.max(largest[key], Math.abs(run[k + 1]));
        }
      });
    }
    return { prompt, pieces, largest, ...prompt };
  }

  // Mean, least and greatest advantage of a piece's tokens over its rollouts, or of one rollout.
  function creditOf(tree, piece, scheme, row) {
    const key = `${scheme} ${row}`;
    if (piece.cached.has(key)) return piece.cached.get(key);
    const { rewards, runs } = tree.prompt;
    const counts = new Map();
    let total = 0;
    for (const member of row === null ? piece.rows : [row]) {
      if (rewards[member] === null) continue;
      const index = tree.credit[scheme][member];
      counts.set(index, (counts.get(index) || 0) + 1);
      total += 1;
    }
    let result = null;
    if (total > 0) {
      const length = piece.end - piece.start;
      result = { mean: new Float64Array(length), low: new Float64Array(length), high: new Float64Array(length), total };
      result.low.fill(Infinity);
      result.high.fill(-Infinity);
      for (const [index, count] of counts) {
        const run = runs[index];
        let k = 0;
        for (let t = 0; t < length; t++) {
          while (k < run.length - 2 && run[k] <= piece.start + t) k += 2;
          const value = run[k + 1];
          result.mean[t] += (value * count) / total;
          result.low[t] = Math.min(result.low[t], value);
          result.high[t] = Math.max(result.high[t], value);
        }
      }
      for (let t = 0; t < length; t++) {
        // The values have five digits: a mean of equal ones is exact, and what they cancel to is 0.
        const size = Math.max(Math.abs(result.low[t]), Math.abs(result.high[t]));
        if (result.low[t] === result.high[t]) result.mean[t] = result.low[t];
        else if (Math.abs(result.mean[t]) < 1e-4 * size) result.mean[t] = 0;
      }
    }
    piece.cached.set(key, result);
    return result;
  }

  function colour(value, largest) {
    if (value === null) return "u";
    if (value === 0 || largest === 0) return "z";
    const level = Math.max(1, Math.min(LEVELS, Math.ceil((Math.abs(value) / largest) * LEVELS - 1e-9)));
    return (value > 0 ? "p" : "n") + level;
  }

  let tree = null;
  let focused = null;
  const list = byId("pieces");

  function drawPrompt() {
    const prompt = data.prompts[state.prompt];
    tree = readTree(prompt);
    focused = null;
    state.row = null;
    byId("name").textContent = prompt.name;
    byId("text").textContent = prompt.text;
    byId("text").hidden = prompt.text === "";
    const facts = [
      `${many(prompt.rewards.length, "rollout")}, ${prompt.distinct.toLocaleString("en")} distinct`,
      `mean reward ${number(prompt.mean)}`,
      prompt.boundaries.length === 0 ? "no boundary" : (prompt.boundaries.length > 1 ? "boundaries " : "boundary ") +
        prompt.boundaries.map((p, k) => `${p}${prompt.isShared[k] ? "" : " (not shared)"}`).join(", "),
      `${percent(prompt.share)} of the tokens with span credit`,
    ];
    if (prompt.isEqual) {
      facts.push(prompt.mean === null ? "no rollout has a reward: every advantage is 0" : "all rewards are equal: every advantage is 0");
    }
    byId("facts").textContent = facts.join(" · ");
    list.replaceChildren(...tree.pieces.map((piece) => piece.item));
    // The first piece stands for the prompt, which has its heading; what ends there has no token at all.
    if (!tree.pieces[0].ending.length) tree.pieces.shift().item.remove();
    drawMore();
    markCurrent();
  }

  function drawMore() {
    let lines = 0, tokens = 0;
    for (const piece of tree.pieces) {
      if (piece.isDrawn) continue;
      if (lines === MOST_LINES || tokens > MOST_TOKENS) break;
      drawPiece(piece);
      lines += 1;
      tokens += piece.cells.length;
    }
    showRows();
    recolour();
  }

  byId("more").addEventListener("click", drawMore);

  function drawPiece(piece) {
    const item = piece.item;
    piece.isDrawn = true;
    item.style.setProperty("--depth", Math.max(0, Math.min(piece.depth, DEEPEST)));
    item.setAttribute("aria-level", Math.max(1, piece.depth + 1));
    const head = put(item, "div", "head");
    const meta = put(head, "div", "meta");
    if (piece.hasChildren && piece.parent) {
      const toggle = put(meta, "button", "toggle", "▾");
      toggle.type = "button";
      toggle.setAttribute("aria-expanded", "true");
      toggle.setAttribute("aria-label", "What follows");
      toggle.addEventListener("click", () => {
        piece.isClosed = !piece.isClosed;
        toggle.textContent = piece.isClosed ? "▸" : "▾";
        toggle.setAttribute("aria-expanded", String(!piece.isClosed));
        showRows();
      });
    }
    const { rewards, boundaries } = tree.prompt;
    const known = piece.rows.map((row) => rewards[row]).filter((reward) => reward !== null);
    const isLeaf = piece.ending.length === piece.rows.length;
    if (!piece.parent) {
      put(meta, "span", "who", `${many(piece.ending.length, "rollout")} without a token`);
      drawChips(meta, piece);
    } else {
      if (!isLeaf || piece.rows.length > 1) {
        put(meta, "span", "who", many(piece.rows.length, "rollout"));
        if (!isLeaf) put(meta, "span", "names", names(piece.rows));
        const mean = known.length ? known.reduce((sum, reward) => sum + reward / known.length, 0) : null;
        put(meta, "span", "", `mean reward ${number(mean)}`);
      }
      if (isLeaf) drawChips(meta, piece);
      put(meta, "span", "", `tokens ${piece.start}–${piece.end}`);
      if (piece.isNode) put(meta, "span", "badge is-node", `node at boundary ${piece.end}`);
      else if (piece.hasChildren) put(meta, "span", "badge", "fork");
      if (piece.depth > DEEPEST) put(meta, "span", "badge", `depth ${piece.depth}`);
      if (!isLeaf && piece.ending.length) {
        put(meta, "span", "", `${piece.ending.length} end here:`);
        drawChips(meta, piece);
      }
    }
    const result = put(head, "div", "result");
    piece.range = put(result, "span");
    piece.value = put(result, "span", "value");
    if (piece.end === piece.start) return;

    const line = put(item, "div", "tokens" + (piece.isNode ? " cut" : ""));
    const marked = new Set(boundaries);
    const earned = tree.credit["step rewards"] ? creditOf(tree, piece, "step rewards", null) : null;
    for (let t = 0; t < piece.end - piece.start; t++) {
      const rank = tree.tokens[piece.offset + t];
      const text = data.texts[rank];
      const cell = make("span", "", text === null ? String(data.ids[rank]) : symbols(text));
      let kind = "t";
      if (text === null) kind += " number";
      else if (text.includes("\n")) kind += " nl";
      if (tree.holes && tree.holes[piece.offset + t]) kind += " hole";
      if (earned && (earned.low[t] !== 0 || earned.high[t] !== 0)) kind += " earned";
      if (t > 0 && marked.has(piece.start + t)) kind += " edge";
      cell.kind = kind;
      cell.tabIndex = -1;
      cell.place = [piece, t];
      piece.cells.push(cell);
      line.appendChild(cell);
    }
  }

  function drawChips(meta, piece) {
    const { rewards } = tree.prompt;
    const isSame = piece.ending.every((row) => rewards[row] === rewards[piece.ending[0]]);
    for (const row of piece.ending.slice(0, MOST_CHIPS)) {
      const chip = put(meta, "button", "chip");
      chip.type = "button";
      chip.title = "Show this rollout only";
      chip.setAttribute("aria-pressed", "false");
      chip.row = row;
      put(chip, "span", "", `#${row}`);
      // Of many with one reward, the mean before them has said it.
      if (isSame && piece.parent && piece.ending.length > 1 && piece.ending.length === piece.rows.length) continue;
      put(chip, "span", "", `reward ${shortNumber(rewards[row])}`);
      if (rewards[row] !== null) put(put(chip, "span", "level"), "i").style.width = `${100 * ofRewards(rewards[row])}%`;
    }
    const more = piece.ending.length - MOST_CHIPS;
    if (more > 0) put(meta, "span", "", `and ${more} more of the same tokens`);
  }

  const shortNumber = (value) => number(value).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
  const { low: leastReward, high: mostReward } = data.charts.depths;
  const ofRewards = (reward) => mostReward > leastReward ? Math.min(1, Math.max(0, (reward - leastReward) / (mostReward - leastReward))) : 1;

  // White space that would not be seen; a space has the token's colour behind it.
  const symbols = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "⇥");

  // Ascending rows, three or more in succession as a range; at most eight of these.
  function names(rows) {
    const runs = [];
    for (const row of rows) {
      const last = runs[runs.length - 1];
      if (last && row === last[1] + 1) last[1] = row;
      else runs.push([row, row]);
    }
    const words = runs.flatMap(([from, to]) => to - from > 1 ? [`#${from}–${to}`] : from === to ? [`#${from}`] : [`#${from}`, `#${to}`]);
    return words.length > 8 ? `${words.slice(0, 7).join(" ")} … ${words[words.length - 1]}` : words.join(" ");
  }

  function recolour() {
    const largest = tree.largest[state.scheme];
    for (const piece of tree.pieces) {
      if (!piece.isDrawn) continue;
      const credit = creditOf(tree, piece, state.scheme, piece.rows.includes(state.row) ? state.row : null);
      piece.cells.forEach((cell, t) => {
        const isHole = tree.holes && tree.holes[piece.offset + t];
        cell.className = `${cell.kind} ${isHole ? "z" : colour(credit ? credit.mean[t] : null, largest)}`;
      });
      drawValue(piece, credit, largest);
    }
    byId("least").textContent = signed(-largest);
    byId("most").textContent = signed(largest);
    byId("legend").setAttribute("aria-label", `Advantage from ${number(-largest)} (orange) over 0 to ${number(largest)} (blue)`);
    byId("note").textContent = data.schemes.find(({ key }) => key === state.scheme).note;
  }

  function drawValue(piece, credit, largest) {
    piece.value.className = "value";
    piece.value.hidden = !piece.cells.length;
    piece.range.textContent = "";
    if (!credit || !piece.cells.length) {
      piece.value.textContent = "no reward";
      return;
    }
    let low = Infinity, high = -Infinity, sum = 0;
    for (let t = 0; t < credit.mean.length; t++) {
      low = Math.min(low, credit.low[t]);
      high = Math.max(high, credit.high[t]);
      sum += credit.mean[t] / credit.mean.length;
    }
    const mean = low === high ? low : sum;
    piece.value.textContent = signed(mean);
    if (low !== high) piece.range.textContent = `mean of ${signed(low)} to ${signed(high)}`;
    piece.value.classList.add(colour(mean, largest));
  }

  function showRows() {
    let hiddenBelow = Infinity;
    for (const piece of tree.pieces) {
      if (piece.depth <= hiddenBelow) hiddenBelow = Infinity;
      const isOther = state.row !== null && !piece.rows.includes(state.row);
      piece.item.hidden = !piece.isDrawn || isOther || piece.depth > hiddenBelow;
      if (piece.isClosed && hiddenBelow === Infinity && state.row === null) hiddenBelow = piece.depth;
    }
    const left = tree.pieces.filter((piece) => !piece.isDrawn).length;
    byId("more").hidden = left === 0 || state.row !== null;
    byId("more").textContent = `Show more of the tree: ${many(left, "line")} left`;
    // One token can be reached with Tab, the others from there with the arrows.
    if (!focused || focused.place[0].item.hidden) {
      if (focused) focused.tabIndex = -1;
      const first = tree.pieces.find((piece) => piece.cells.length && !piece.item.hidden);
      focused = first ? first.cells[0] : null;
      if (focused) focused.tabIndex = 0;
    }
  }

  function choosePath(row) {
    state.row = state.row === row ? null : row;
    for (const piece of tree.pieces) if (!piece.isDrawn && piece.rows.includes(state.row)) drawPiece(piece);
    for (const chip of list.querySelectorAll(".chip")) chip.setAttribute("aria-pressed", String(chip.row === state.row));
    byId("only").hidden = state.row === null;
    if (state.row !== null) {
      byId("only-text").textContent = `Rollout #${row} alone, from its first token to its last: its own advantages, reward ${number(tree.prompt.rewards[row])}.`;
    }
    showRows();
    recolour();
    remember();
  }

  list.addEventListener("click", (event) => {
    const chip = event.target.closest(".chip");
    if (chip) choosePath(chip.row);
  });
  byId("all").addEventListener("click", () => choosePath(state.row));

  // ---- what is known of a token
  const tip = byId("tip");

  function drawTip(cell) {
    const [piece, t] = cell.place;
    const rank = tree.tokens[piece.offset + t];
    const text = data.texts[rank];
    const logprob = tree.logprobs[piece.offset + t];
    const nats = logprob === null ? null : -logprob;
    tip.replaceChildren();
    put(tip, "span", "what", text === null ? `id ${data.ids[rank]}` : `“${symbols(text).replace(/ /g, "·")}”`);
    const facts = put(tip, "dl");
    const fact = (name, value) => {
      put(facts, "dt", "", name);
      return put(facts, "dd", "", value);
    };
    fact("Position", String(piece.start + t));
    fact("Token id", String(data.ids[rank]));
    fact("Surprisal", nats === null ? "none" : `${number(nats)} nats (p = ${number(Math.exp(-nats))})`);
    const row = piece.rows.includes(state.row) ? state.row : null;
    fact("Rollouts", row === null ? String(piece.rows.length) : `#${row} of ${piece.rows.length}`);
    if (tree.holes && tree.holes[piece.offset + t]) fact("Mask", "not trained on");
    const earned = tree.credit["step rewards"] ? creditOf(tree, piece, "step rewards", row) : null;
    if (earned && (earned.low[t] !== 0 || earned.high[t] !== 0)) fact("Earned here", signed(earned.mean[t]));
    put(facts, "div", "rule");
    for (const { key, name } of data.schemes) {
      put(facts, "dt", key === state.scheme ? "active" : "", name);
      const place = put(facts, "dd");
      const credit = creditOf(tree, piece, key, row);
      if (!credit) {
        place.textContent = "no reward";
        continue;
      }
      put(place, "b", colour(credit.mean[t], tree.largest[key]), signed(credit.mean[t]));
      if (credit.low[t] !== credit.high[t]) put(place, "small", "", `mean; ${signed(credit.low[t])} to ${signed(credit.high[t])}`);
    }
    tip.hidden = false;
    const box = cell.getClientRects()[0] || cell.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = tip;
    tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - width - 8))}px`;
    tip.style.top = `${box.bottom + height + 16 < innerHeight ? box.bottom + 8 : Math.max(8, box.top - height - 8)}px`;
  }

  const cellOf = (event) => (event.target.place ? event.target : null);
  const hideTip = () => { tip.hidden = true; };
  list.addEventListener("pointerover", (event) => {
    if (event.pointerType !== "touch") {
      if (cellOf(event)) drawTip(event.target);
      else hideTip();
    }
  });
  list.addEventListener("pointerleave", hideTip);
  list.addEventListener("focusin", (event) => {
    const cell = cellOf(event);
    if (!cell) return;
    if (focused) {
      focused.tabIndex = -1;
      focused.removeAttribute("aria-describedby");
    }
    focused = cell;
    cell.tabIndex = 0;
    drawTip(cell);
    cell.setAttribute("aria-describedby", "tip");
  });
  list.addEventListener("focusout", hideTip);
  addEventListener("scroll", () => {
    if (focused && focused === document.activeElement) drawTip(focused);
    else hideTip();
  }, { passive: true });
  list.addEventListener("keydown", (event) => {
    const cell = cellOf(event);
    if (!cell) return;
    const [piece, t] = cell.place;
    const shown = tree.pieces.filter((other) => other.cells.length && !other.item.hidden);
    const at = shown.indexOf(piece);
    const first = (other) => other && other.cells[0];
    const last = (other) => other && other.cells[other.cells.length - 1];
    const targets = {
      ArrowRight: () => piece.cells[t + 1] || first(shown[at + 1]),
      ArrowLeft: () => piece.cells[t - 1] || last(shown[at - 1]),
      ArrowDown: () => first(shown[at + 1]),
      ArrowUp: () => first(shown[at - 1]),
      Home: () => first(piece),
      End: () => last(piece),
    };
    if (event.key === "Escape") hideTip();
    if (!(event.key in targets)) return;
    event.preventDefault();
    const target = targets[event.key]();
    if (target) target.focus();
  });

  // ---- the table of prompts
  const order = { name: (p, i) => i, mean: (p) => (p.mean === null ? -Infinity : p.mean), share: (p) => p.share, mixed: (p) => p.mixed };

  function drawTable() {
    const query = byId("query").value.trim().toLowerCase();
    const onlyMixed = byId("only-mixed").checked;
    let chosen = data.prompts.map((prompt, index) => ({ prompt, index })).filter(({ prompt }) =>
      (prompt.name + "\n" + prompt.text).toLowerCase().includes(query) && (!onlyMixed || prompt.mixed > 0));
    if (state.sort) {
      const key = order[state.sort];
      chosen.sort((a, b) => (key(a.prompt, a.index) - key(b.prompt, b.index)) * (state.falls ? -1 : 1) || a.index - b.index);
    }
    state.order = chosen.map(({ index }) => index);
    byId("count").textContent = chosen.length === data.prompts.length ? String(chosen.length) : `${chosen.length} of ${data.prompts.length}`;
    byId("rows").replaceChildren(...chosen.map(({ prompt, index }) => drawTableRow(prompt, index)));
    for (const head of document.querySelectorAll("th")) {
      const isSorted = head.firstElementChild.dataset.sort === state.sort;
      if (isSorted) head.setAttribute("aria-sort", state.falls ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    }
    markCurrent();
  }

  function drawTableRow(prompt, index) {
    const row = make("tr");
    row.index = index;
    const name = put(row, "td");
    const button = put(name, "button", "", prompt.name);
    button.type = "button";
    button.title = prompt.name;
    put(name, "span", "sub", prompt.text.trim().split("\n")[0]);

    const rewards = put(put(row, "td"), "div", "cell");
    put(rewards, "b", "", prompt.mean === null ? "none" : shortNumber(Math.round(prompt.mean * 100) / 100));
    const bins = new Array(6).fill(0);
    for (const reward of prompt.rewards) if (reward !== null) bins[Math.min(5, Math.floor(ofRewards(reward) * 6))] += 1;
    const histogram = put(rewards, "span", "histogram");
    histogram.setAttribute("aria-hidden", "true");
    for (const bin of bins) put(histogram, "i").style.height = `${(100 * bin) / Math.max(1, ...bins)}%`;

    const share = put(put(row, "td"), "div", "cell");
    put(share, "b", "", percent(prompt.share));
    put(put(share, "span", "track"), "i").style.width = `${100 * prompt.share}%`;

    put(row, "td", prompt.mixed ? "" : "faint", `${prompt.mixed} of ${prompt.boundaries.length}`);
    return row;
  }

  function markCurrent() {
    for (const row of byId("rows").children) {
      const isCurrent = row.index === state.prompt;
      row.classList.toggle("current", isCurrent);
      if (isCurrent) row.querySelector("button").setAttribute("aria-current", "true");
      else row.querySelector("button").removeAttribute("aria-current");
    }
    const at = state.order.indexOf(state.prompt);
    byId("previous").disabled = at <= 0;
    byId("next").disabled = at < 0 || at === state.order.length - 1;
  }

  function choosePrompt(index, scroll) {
    state.prompt = index;
    byId("only").hidden = true;
    hideTip();
    drawPrompt();
    remember();
    if (scroll) byId("tree").scrollIntoView({ block: "start" });
  }

  byId("rows").addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    // Beside the table the tree is in sight at once; below it, it is not.
    if (row) choosePrompt(row.index, matchMedia("(max-width: 1080px)").matches || byId("tree").getBoundingClientRect().top < 0);
  });
  byId("previous").addEventListener("click", () => choosePrompt(state.order[state.order.indexOf(state.prompt) - 1]));
  byId("next").addEventListener("click", () => choosePrompt(state.order[state.order.indexOf(state.prompt) + 1]));
  byId("query").addEventListener("input", drawTable);
  byId("only-mixed").addEventListener("change", drawTable);
  byId("breaks").addEventListener("change", (event) => list.classList.toggle("breaks", event.target.checked));
  document.querySelector("thead").addEventListener("click", (event) => {
    const key = event.target.dataset.sort;
    if (!key) return;
    // First the way one looks for: names from the top, numbers from the greatest; then the other way; then the file's.
    const firstFalls = key !== "name";
    if (state.sort !== key) [state.sort, state.falls] = [key, firstFalls];
    else if (state.falls === firstFalls) state.falls = !firstFalls;
    else state.sort = null;
    drawTable();
  });

  // ---- charts
  function shape(parent, tag, attributes, text) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    return parent.appendChild(element);
  }

  const HEIGHT = 178, LEFT = 40, RIGHT = 8, TOP = 8, BOTTOM = 26;
  const charts = data.charts;

  function frame(id, ticks, format) {
    const holder = byId(id);
    const width = Math.max(holder.clientWidth, 160);
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    svg.setAttribute("role", "img");
    holder.replaceChildren(svg);
    const y = (share) => HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM);
    const most = ticks[ticks.length - 1], least = ticks[0];
    for (const tick of ticks) {
      const at = y(most > least ? (tick - least) / (most - least) : 0);
      shape(svg, "line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: at, y2: at });
      shape(svg, "text", { x: LEFT - 7, y: at + 4, "text-anchor": "end" }, format(tick));
    }
    return { svg, y, width, inner: width - LEFT - RIGHT };
  }

  function positions(box) {
    const bins = charts.shared.length;
    const step = box.inner / Math.max(1, bins);
    const x = (bin) => LEFT + (bin + 0.5) * step;
    for (const share of [0, 0.5, 1]) {
      const anchor = share === 0 ? "start" : share === 1 ? "end" : "middle";
      shape(box.svg, "text", { x: LEFT + share * box.inner, y: HEIGHT - 8, "text-anchor": anchor }, String(Math.round(share * charts.length)));
    }
    return { x, step, bins };
  }

  const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
  const binName = (bin) => charts.width === 1 ? `position ${bin}` : `positions ${bin * charts.width}–${Math.min(charts.length, (bin + 1) * charts.width) - 1}`;

  // A line under the pointer, and what it says in words below the chart.
  function follow(box, place, readout, words, summary) {
    readout.textContent = summary;
    box.svg.setAttribute("aria-label", summary);
    const cursor = shape(box.svg, "line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
    box.svg.addEventListener("pointermove", (event) => {
      const bin = Math.floor((event.clientX - box.svg.getBoundingClientRect().left - LEFT) / place.step);
      const isIn = bin >= 0 && bin < place.bins;
      cursor.setAttribute("visibility", isIn ? "visible" : "hidden");
      if (!isIn) return;
      cursor.setAttribute("x1", place.x(bin));
      cursor.setAttribute("x2", place.x(bin));
      readout.textContent = words(bin);
    });
    box.svg.addEventListener("pointerleave", () => {
      cursor.setAttribute("visibility", "hidden");
      readout.textContent = summary;
    });
  }

  function drawShared() {
    const box = frame("chart-shared", [0, 0.5, 1], percent);
    const place = positions(box);
    const points = charts.shared.map((share, bin) => [place.x(bin), box.y(share)]);
    const most = Math.max(1, ...charts.boundaries);
    charts.boundaries.forEach((count, bin) => {
      const height = (count / most) * 44;
      shape(box.svg, "rect", { class: "bars", x: place.x(bin) - place.step * 0.32, width: place.step * 0.64, y: box.y(0) - height, height });
    });
    if (points.length) {
      shape(box.svg, "path", { class: "area", d: `${path(points)}L${place.x(points.length - 1)} ${box.y(0)}L${place.x(0)} ${box.y(0)}Z` });
      shape(box.svg, "path", { class: "line", d: path(points) });
    }
    const half = charts.shared.findIndex((share) => share < 0.5);
    const summary = half < 0 ? "Half of the rollouts or more share their prefix to the end." : `Fewer than half share their prefix from ${binName(half)} on.`;
    follow(box, place, byId("read-shared"), (bin) =>
      `${binName(bin)}: ${percent(charts.shared[bin])} of ${many(Math.round(charts.alive[bin]), "rollout")}; boundaries: ${charts.boundaries[bin]}`, summary);
  }

  function drawCredit() {
    const all = Object.values(charts.credit).flat();
    const most = Math.max(1, Math.ceil(Math.max(0, ...all)));
    const box = frame("chart-credit", most > 4 ? [0, most / 2, most] : Array.from({ length: most + 1 }, (_, i) => i), (tick) => shortNumber(tick));
    const place = positions(box);
    for (const key of [...Object.keys(charts.credit).filter((other) => other !== state.scheme), state.scheme]) {
      const points = charts.credit[key].map((value, bin) => [place.x(bin), box.y(value / most)]);
      if (points.length) shape(box.svg, "path", { class: key === state.scheme ? "line" : "other", d: path(points) });
    }
    const { name } = data.schemes.find(({ key }) => key === state.scheme);
    shape(box.svg, "text", { x: box.width - RIGHT, y: TOP + 15, "text-anchor": "end" }, `blue: ${name}; grey: the others`);
    const own = charts.credit[state.scheme];
    const summary = own.length ? `${name}: ${own[0].toFixed(2)} at the first positions, ${own[own.length - 1].toFixed(2)} at the last.` : "";
    follow(box, place, byId("read-credit"), (bin) =>
      `${binName(bin)}: ${data.schemes.map((scheme) => `${scheme.name} ${charts.credit[scheme.key][bin].toFixed(2)}`).join(", ")}`, summary);
  }

  function drawDepths() {
    const { low, high, rows } = charts.depths;
    const box = frame("chart-depth", high > low ? [low, (low + high) / 2, high] : [low], shortNumber);
    const step = box.inner / Math.max(1, rows.length);
    const title = (depth) => (depth === 0 ? "prompt" : depth < 0 ? "rollout" : step < 52 ? String(depth) : `node ${depth}`);
    rows.forEach(({ depth, bins, mean }, i) => {
      const middle = LEFT + (i + 0.5) * step;
      const most = Math.max(...bins);
      bins.forEach((count, bin) => {
        if (!count) return;
        const width = Math.max(2, (count / most) * Math.min(step * 0.82, 90));
        const height = (HEIGHT - TOP - BOTTOM) / bins.length;
        // Twenty-four bins fill the height; a lone value has the middle.
        shape(box.svg, "rect", { class: "bean", x: middle - width / 2, width, y: box.y((bin + 1) / bins.length), height: height - 0.5 });
      });
      shape(box.svg, "circle", { class: "dot", cx: middle, cy: box.y(high > low ? (mean - low) / (high - low) : 0.5), r: 4 });
      shape(box.svg, "text", { x: middle, y: HEIGHT - 8, "text-anchor": "middle" }, title(depth));
    });
    const nodes = rows.filter(({ depth }) => depth > 0);
    const summary = nodes.length ? `${nodes.map((row) => `${many(row.rollouts, "rollout")} in a node of depth ${row.depth}`).slice(0, 2).join(", ")}.` : "No rollout is in a node.";
    const place = { step, bins: rows.length, x: (i) => LEFT + (i + 0.5) * step };
    follow(box, place, byId("read-depth"), (i) =>
      `${title(rows[i].depth)}: ${many(rows[i].rollouts, "rollout")}, mean reward ${number(rows[i].mean)}`, summary);
  }

  function drawCharts() {
    drawShared();
    drawCredit();
    drawDepths();
  }

  // ---- the switch, the theme, and the address that remembers both
  function chooseScheme(key) {
    state.scheme = key;
    for (const input of document.querySelectorAll("input[name=scheme]")) input.checked = input.value === key;
    if (tree) recolour();
    drawCredit();
    hideTip();
    remember();
  }

  byId("schemes").addEventListener("change", (event) => chooseScheme(event.target.value));

  function chooseTheme(theme) {
    state.theme = theme;
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    byId("theme").textContent = `Theme: ${theme}`;
    remember();
  }

  byId("theme").addEventListener("click", () => chooseTheme({ auto: "light", light: "dark", dark: "auto" }[state.theme]));

  let isReading = true;

  function remember() {
    if (isReading) return;
    const words = [`prompt=${state.prompt}`, `scheme=${state.scheme}`];
    if (state.theme !== "auto") words.push(`theme=${state.theme}`);
    if (state.row !== null) words.push(`rollout=${state.row}`);
    try {
      history.replaceState(null, "", `#${words.join("&")}`);
    } catch {
      // In the frame of a notebook the page has no address of its own.
    }
  }

  function readAddress() {
    const words = new URLSearchParams(location.hash.slice(1));
    isReading = true;
    if (["light", "dark"].includes(words.get("theme"))) chooseTheme(words.get("theme"));
    if (data.schemes.some(({ key }) => key === words.get("scheme"))) state.scheme = words.get("scheme");
    const prompt = Number(words.get("prompt"));
    state.order = data.prompts.map((_, index) => index);
    drawTable();
    if (data.prompts.length) choosePrompt(data.prompts[prompt] ? prompt : 0);
    chooseScheme(state.scheme);
    const row = words.get("rollout") === null ? -1 : Number(words.get("rollout"));
    if (tree && row in tree.prompt.rewards) choosePath(row);
    isReading = false;
  }

  // Steps of the scale in the legend.
  for (let level = LEVELS; level >= 1; level--) put(byId("steps"), "i", `n${level}`);
  put(byId("steps"), "i", "z");
  for (let level = 1; level <= LEVELS; level++) put(byId("steps"), "i", `p${level}`);

  readAddress();
  drawCharts();
  byId("unscripted").remove();
  // The link that skips to the tree has an address too, without a state in it.
  addEventListener("hashchange", () => { if (location.hash.includes("=")) readAddress(); });
  let width = innerWidth;
  addEventListener("resize", () => {
    if (width !== innerWidth) drawCharts();
    width = innerWidth;
  });
})();
