// The section Compare: sends a prompt, and shows the answers as they are written.
{
  const form = byId("compare-form"), field = byId("prompt"), status = byId("compare-status");
  const columns = new Map([...document.querySelectorAll("#answers article")].map((column) => [column.dataset.model, column]));
  const part = (column, name) => column.querySelector(name);
  const isDone = (column) => column.hidden || column.dataset.done;
  const requests = new Streamed(byId("stop"));

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = field.value, answer = form.dataset.answer;
    if (!text.trim()) { field.focus(); return; }
    requests.stop("stopped");
    const settings = new FormData(form);
    const body = { text, models: settings.getAll("models") };
    for (const name of ["temperature", "top_p", "top_k", "longest", "seed"]) body[name] = Number(settings.get(name));
    for (const [name, column] of columns) {
      column.hidden = !body.models.includes(name);
      column.tokens = [];
      delete column.dataset.done;
      part(column, ".answer").replaceChildren();
      part(column, ".facts").textContent = "waiting for its first token";
      part(column, ".facts").classList.remove("failed");
      part(column, ".more").hidden = true;
    }
    popover.hide();
    const question = ["Asked: ", make("q", {}, text)];
    if (answer) question.push(" The right result is ", make("b", {}, answer), ".");
    const say = (note) => status.replaceChildren(...question, " ", make("span", { className: "soft" }, note));
    const count = () => [...columns.values()].filter((column) => !column.hidden && isDone(column)).length;
    if (!body.models.length) { status.textContent = "Choose a model below “Models and sampling”."; return; }
    say(`0 of ${body.models.length} done`);
    requests.send("compare", body, (updates) => {
      const previous = count();
      for (const update of updates) show(columns.get(update.model), update);
      if (count() > previous) say(`${count()} of ${body.models.length} done`);
    }, (why) => {
      for (const column of columns.values()) if (!isDone(column)) end(column, why || "stopped by the server");
      if (why) say(why);
    });
  });

  // Shows what `compare.column` of the server says of a model.
  function show(column, update) {
    const facts = part(column, ".facts"), text = part(column, ".answer");
    if (update.failed) {
      facts.textContent = update.failed;
      facts.classList.add("failed");
      column.dataset.done = "1";
      return;
    }
    column.text = update.text || (update.stopped ? "(nothing)" : "");
    column.tokens.push(...update.tokens);
    const count = written(column), speed = update.seconds ? [`${Math.round(count / update.seconds)} tokens/s`] : [];
    facts.textContent = [tokens(count), ...speed, update.stopped || "writing"].join(" · ");
    if (update.stopped) column.dataset.done = "1";
    if (byId("probabilities").checked) text.append(...update.tokens.map(shaded));
    else text.textContent = column.text;
    part(column, ".more").hidden = text.scrollHeight <= text.clientHeight || column.classList.contains("open");
    tabStop(text);
  }

  // Only tokens that the model wrote count. Tokens that tools returned have no alternatives.
  const written = (column) => column.tokens.filter((token) => token.others.length).length;
  const tokens = (count) => `${count} token${count === 1 ? "" : "s"}`;

  // Ends a column whose answer the server did not end, and shows why.
  function end(column, why) {
    const facts = part(column, ".facts"), count = written(column);
    facts.textContent = count ? `${tokens(count)} · ${why}` : why;
    column.dataset.done = "1";
  }

  // The tokens with a colour that says how probable each was, and the alternatives when one is pointed at or focused.
  // The shade is 0 for a probable token, and one more for each halving of the probability.
  const shade = (logProb) => Math.min(5, Math.floor(-(logProb ?? -9) / Math.LN2));
  const shaded = (token) => (token.others.length
    ? make("span", { className: `token p${shade(token.logProb)}`, tabIndex: -1, describe: () => alternatives(token) }, token.text)
    : make("span", { className: "soft" }, token.text));
  function alternatives(token) {
    const rows = token.others.map(([text, logProb]) => make("tr", { className: text === token.text ? "chosen" : "" },
      make("th", { scope: "row" }, `“${text}”`), make("td", {}, bar(Math.exp(logProb)), make("span", {}, percent(logProb)))));
    return [make("p", {}, `“${token.text}” had ${percent(token.logProb)}. Most probable here:`), make("table", {}, make("tbody", {}, ...rows))];
  }
  byId("probabilities").addEventListener("change", ({ target }) => {
    byId("legend").hidden = !target.checked;
    popover.hide();
    for (const column of columns.values()) {
      const text = part(column, ".answer");
      if (!column.tokens?.length) continue;
      text.replaceChildren(...(target.checked ? column.tokens.map(shaded) : [column.text]));
      tabStop(text);
    }
  });

  byId("answers").addEventListener("click", (event) => {
    if (!event.target.matches(".more")) return;
    event.target.closest("article").classList.add("open");
    event.target.hidden = true;
  });

  // A reload keeps the prompt. What is typed has no known result.
  try { field.value = sessionStorage.getItem("compare.prompt") ?? ""; } catch { /* private */ }
  field.addEventListener("input", () => { form.dataset.answer = ""; });
  addEventListener("pagehide", () => { try { sessionStorage.setItem("compare.prompt", field.value); } catch { /* private */ } });
  offer("compare-form", () => true);
}
