// The section Prefer: shows pairs, and sends votes until the server confirms that they are on its disk. The tab keeps
// the vote that is not confirmed yet and the pair that is shown, so that neither a reload nor a restarted server changes
// its place. `pipeline/app/voting.py` is the server's side.
{
  const section = byId("prefer-section");
  const NAMES = { first: "A", second: "B", tie: "tie", bad: "both bad", skip: "skipped" };
  const KEYS = { a: "vote-a", b: "vote-b", t: "vote-tie", x: "vote-bad", s: "vote-skip", u: "vote-undo" };
  const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(12)), (b) => b.toString(16).padStart(2, "0")).join("");
  const tab = {
    get: (key) => { try { return JSON.parse(sessionStorage.getItem("prefer." + key)); } catch { return null; } },
    set: (key, value) => { try { sessionStorage.setItem("prefer." + key, JSON.stringify(value)); } catch { /* private */ } },
  };
  const page = tab.get("page") || newId();
  tab.set("page", page);
  // The second click of a double click must not vote on the next pair.
  const DOUBLE_CLICK = 400;
  let pair = null, shownAt = 0, busy = true, lost = false, losses = 0, typing = 0, stack = tab.get("stack") || [];

  const requested = new URLSearchParams(location.search).get("annotator");
  let remembered = "";
  try { remembered = localStorage.getItem("prefer.annotator") || ""; } catch { /* private */ }
  if (!byId("annotator").readOnly) byId("annotator").value = requested || remembered;
  // The annotator whose pair is shown. The address may name somebody else than the tab did before.
  let named = byId("annotator").value;
  if (tab.get("named") !== named) tab.set("stack", stack = []);
  tab.set("named", named);
  const who = () => ({ annotator: byId("annotator").value.slice(0, 80), page, a: byId("prefer-model-a").value, b: byId("prefer-model-b").value });

  function say(text, bad = false) {
    const status = byId("prefer-status");
    if (status.textContent !== text) status.textContent = text;
    status.classList.toggle("bad", bad);
  }

  // Asks again until the server answers. Throws an error if it refuses the request.
  async function ask(path, body) {
    for (let wait = 300; ; wait = Math.min(wait * 2, 3000)) {
      let response = null;
      try {
        response = await post("prefer/" + path, body);
        if (response.ok) {
          const answer = await response.json();
          if (lost) { lost = false; say("Connected again."); }
          return answer;
        }
      } catch { /* the connection, not the request */ }
      if (response && response.status < 500) {
        throw Object.assign(new Error(await reason(response)), { status: response.status });
      }
      if (!lost) losses += 1;
      lost = true;
      say(response ? `The server has a problem (${response.status}); trying again…` : "The connection is lost; trying again…", true);
      await new Promise((done) => setTimeout(done, wait));
    }
  }

  function setBusy(value) {
    busy = value;
    byId("prefer-ballot").setAttribute("aria-busy", String(value));
    for (const button of section.querySelectorAll("#prefer-ballot button")) {
      button.disabled = value || (button.id === "vote-undo" ? !stack.length : !pair);
    }
    byId("prefer-send").disabled = value;
  }

  function showState(state) {
    byId("votes-count").textContent = state.count;
    const name = byId("annotator");
    if (document.activeElement !== name && (state.annotator !== "anonymous" || name.value)) name.value = state.annotator;
    const parts = [`${state.all} in all, by ${state.people} ${state.people === 1 ? "person" : "people"}`];
    const missing = state.goal - state.usable, minutes = Math.ceil((missing * state.pace) / 60);
    if (state.goal) parts.push(`${state.usable} of ${state.goal} votes for A or B. Ties and skips do not count.`);
    if (missing > 0 && state.pace) parts.push(`about ${minutes} min left at your pace`);
    if (missing <= 0 && state.command) parts.push(make("span", {}, "Enough: ", make("code", {}, state.command), " trains on them."));
    byId("prefer-progress").replaceChildren(...parts.flatMap((part) => [" · ", part]).slice(1));
    byId("prefer-goal").hidden = !state.goal;
    if (state.goal) byId("prefer-goal").value = Math.min(1, state.usable / state.goal);
  }

  // Shows a pair, or the error that there is none.
  function showPair(answer) {
    pair = answer && !answer.error ? answer : null;
    tab.set("pair", pair && pair.pair);
    shownAt = performance.now();
    const turns = byId("prefer-turns");
    turns.replaceChildren();
    for (const turn of pair ? pair.prompt : []) {
      const item = turns.appendChild(document.createElement("div"));
      item.className = "turn";
      if (pair.prompt.length > 1) {
        const role = item.appendChild(document.createElement("span"));
        role.className = "role";
        role.textContent = turn.role;
      }
      item.appendChild(document.createElement("span")).textContent = turn.content;
    }
    const [first, second] = pair ? marked(pair.first, pair.second) : [[], []];
    byId("answer-a").replaceChildren(...first);
    byId("answer-b").replaceChildren(...second);
    for (const id of ["prefer-turns", "answer-a", "answer-b"]) byId(id).scrollTop = 0;
    if (answer && answer.error) say(answer.error, true);
  }

  // Marks the words in which two texts differ. Returns what to show of each; without marks if they have little in common.
  function marked(...texts) {
    const [firstWords, secondWords] = texts.map((text) => text.match(/\s+|[^\s]+/g) ?? []);
    if (firstWords.length * secondWords.length > 1e6) return texts.map((text) => [text]);
    // lengths[i][j] is how many words firstWords.slice(i) and secondWords.slice(j) have in common, in the same order.
    const lengths = Array.from({ length: firstWords.length + 1 }, () => new Uint32Array(secondWords.length + 1));
    for (let i = firstWords.length - 1; i >= 0; i--) {
      for (let j = secondWords.length - 1; j >= 0; j--) {
        lengths[i][j] = firstWords[i] === secondWords[j] ? lengths[i + 1][j + 1] + 1 : Math.max(lengths[i + 1][j], lengths[i][j + 1]);
      }
    }
    if (lengths[0][0] * 3 < Math.min(firstWords.length, secondWords.length)) return texts.map((text) => [text]);
    const pieces = [[], []];
    const mark = (word) => (word.trim() ? make("mark", {}, word) : word);
    for (let i = 0, j = 0; i < firstWords.length || j < secondWords.length;) {
      if (i < firstWords.length && j < secondWords.length && firstWords[i] === secondWords[j]) {
        pieces[0].push(firstWords[i++]);
        pieces[1].push(secondWords[j++]);
      } else if (j === secondWords.length || (i < firstWords.length && lengths[i + 1][j] >= lengths[i][j + 1])) pieces[0].push(mark(firstWords[i++]));
      else pieces[1].push(mark(secondWords[j++]));
    }
    return pieces;
  }

  async function next() {
    setBusy(true);
    say("Two answers are being written…");
    const name = named;
    try {
      const have = tab.get("pair") || "";
      const answer = await ask("next?have=" + encodeURIComponent(have), who());
      // Another name was typed meanwhile, and its pair is on its way.
      if (typing || name !== named) return;
      say("");
      showPair(answer.pair);
      showState(answer.state);
    } catch (error) { say(error.message, true); }
    setBusy(false);
  }

  // Sends a vote, which the tab keeps until it is confirmed.
  async function send(ballot) {
    setBusy(true);
    tab.set("unsent", ballot);
    try {
      const answer = await ask("vote", ballot);
      tab.set("unsent", null);
      const last = stack.at(-1);
      if (ballot.undoes && last && last.vote === ballot.undoes) stack.pop();
      if (ballot.choice && !answer.refused) stack.push({ vote: ballot.vote, pair: ballot.pair, choice: ballot.choice });
      tab.set("stack", stack = stack.slice(-500));
      byId("prefer-comment").value = "";
      showLast();
      say(answer.refused || (ballot.choice ? "Saved." : "Taken back."), Boolean(answer.refused));
      showPair(answer.pair);
      showState(answer.state);
      if (byId("prefer-own").open) listOwn();
      if (byId("prefer-rates")?.open) showRates();
      await new Promise((done) => setTimeout(done, DOUBLE_CLICK));
    } catch (error) {
      if (error.status !== 401) tab.set("unsent", null);
      say(error.message, true);
      if (error.status === 410) {
        tab.set("pair", null);
        tab.set("stack", stack = stack.filter((entry) => entry.vote !== ballot.undoes));
        showLast();
        await next();
        say(error.message, true);
      }
    }
    setBusy(false);
  }

  function vote(choice) {
    if (busy || !pair) return;
    const seconds = Math.round(performance.now() - shownAt) / 1000;
    send({ ...who(), vote: newId(), pair: pair.pair, choice, seconds, comment: byId("prefer-comment").value });
  }

  function undo() {
    const last = stack.at(-1);
    if (!busy && last) send({ ...who(), vote: newId(), pair: last.pair, choice: null, undoes: last.vote });
  }

  function showLast() {
    const last = stack.at(-1);
    byId("prefer-after").hidden = !last;
    byId("prefer-last").textContent = last ? NAMES[last.choice] : "";
    byId("prefer-opinions").replaceChildren();
  }

  async function showOpinions() {
    const last = stack.at(-1), list = byId("prefer-opinions");
    if (!last) return;
    let lines;
    try { lines = await ask("opinions?pair=" + encodeURIComponent(last.pair), who()); }
    catch (error) { lines = [error.message]; }
    list.replaceChildren(...lines.map((line) => make("li", {}, line)));
  }

  async function showRates() {
    let lines;
    try { lines = await ask("rates", {}); } catch (error) { lines = [error.message]; }
    byId("prefer-rates").querySelector("ul").replaceChildren(...lines.map((line) => make("li", {}, line)));
  }

  async function listOwn() {
    let votes = [];
    try { votes = await ask("votes", who()); } catch (error) { say(error.message, true); }
    byId("prefer-list").replaceChildren(...votes.map((entry) => {
      const item = document.createElement("li");
      const comment = entry.comment ? `\nComment: ${entry.comment}` : "";
      item.appendChild(document.createElement("div")).textContent = `${entry.prompt}\nA: ${entry.first}\nB: ${entry.second}${comment}`;
      for (const [choice, name] of Object.entries(NAMES)) {
        const button = item.appendChild(document.createElement("button"));
        button.type = "button";
        button.textContent = name;
        button.setAttribute("aria-pressed", String(choice === entry.choice));
        button.classList.toggle("chosen", choice === entry.choice);
        button.addEventListener("click", () => {
          if (busy || choice === entry.choice) return;
          stack = stack.filter((saved) => saved.vote !== entry.vote);
          send({ ...who(), vote: newId(), pair: entry.pair, choice, undoes: entry.vote });
        });
      }
      return item;
    }));
  }

  async function answerTyped() {
    const text = byId("prefer-prompt").value;
    if (busy || !text.trim()) return;
    setBusy(true);
    say("Two answers are being written…");
    try {
      const answer = await ask("prompt", { ...who(), text });
      say("");
      if (answer.pair.error) say(answer.pair.error, true);
      else { showPair(answer.pair); byId("prefer-prompt").value = ""; }
      showState(answer.state);
    } catch (error) { say(error.message, true); }
    setBusy(false);
  }

  section.addEventListener("click", (event) => {
    // An answer can be clicked as well, unless the click ends a selection of its text.
    const answer = event.target.closest(".prefer-text");
    if (answer && getSelection().isCollapsed) vote(answer.id === "answer-a" ? "first" : "second");
    const button = event.target.closest("button");
    if (!button) return;
    if (button.dataset.choice) vote(button.dataset.choice);
    else if (button.id === "vote-undo") undo();
    else if (button.id === "prefer-others") showOpinions();
  });
  byId("prefer-form").addEventListener("submit", (event) => { event.preventDefault(); answerTyped(); });
  byId("prefer-rates")?.addEventListener("toggle", showRates);
  byId("prefer-own").addEventListener("toggle", () => { if (byId("prefer-own").open) listOwn(); });
  for (const id of ["prefer-model-a", "prefer-model-b"]) {
    byId(id).addEventListener("change", () => { tab.set("pair", null); next(); });
  }
  // The pair of a new name is asked for as soon as the name is typed, and no pair is shown meanwhile. Otherwise the click
  // that ends the typing could be a vote on the pair of the old name.
  function rename() {
    const name = byId("annotator").value;
    if (!typing && name === named) return;
    clearTimeout(typing);
    typing = 0;
    tab.set("named", named = name);
    try { localStorage.setItem("prefer.annotator", name); } catch { /* private */ }
    tab.set("stack", stack = []);
    showLast();
    tab.set("pair", null);
    next();
  }
  byId("annotator").addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(rename, 400);
    showPair(null);
    setBusy(true);
  });
  byId("annotator").addEventListener("change", rename);
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest?.("input, textarea, select, [contenteditable=true]");
    const id = KEYS[event.key?.toLowerCase()];
    if (!id || typing || event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
    event.preventDefault();
    byId(id).click();
  });

  offer("prefer-form", () => true);
  (async () => {
    showLast();
    const unsent = tab.get("unsent");
    if (unsent) await send(unsent);
    else await next();
    // Other people vote, and the server may be started anew.
    for (;;) {
      await new Promise((done) => setTimeout(done, 4000));
      if (busy || document.hidden) continue;
      const lossesSoFar = losses, name = named;
      try {
        const state = await ask("state", who());
        if (typing || name !== named) continue;
        showState(state);
        if (!pair || losses > lossesSoFar) await next();
      } catch { /* shown at the next vote */ }
    }
  })();
}
