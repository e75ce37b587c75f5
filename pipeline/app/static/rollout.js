// The section Watch a rollout: sends a prompt, and shows the steps as they are made.
if (byId("rollout-form")) {
  const form = byId("rollout-form"), steps = byId("rollout-shown"), status = byId("rollout-status");
  const requests = new Streamed(byId("rollout-stop"));
  let cards = [], place = 0, sent = {}, inside = null;

  const chosen = () => form.querySelector("[name=stage]:checked");
  async function choose() {
    const { key, policy, tally } = chosen().dataset, stage = chosen().value;
    requests.stop("");
    steps.replaceChildren();
    status.textContent = "";
    form.elements.policy.value = policy;
    byId("rollout-tally").textContent = tally;
    byId("rollout-result").hidden = key !== "problems";
    fill(form, "");
    const offered = await offer("rollout-form", (prompt) => prompt.key === key);
    // Another stage was chosen, or something typed, meanwhile.
    if (stage === chosen().value && offered.length && !form.elements.text.value) fill(form, offered[0].text, offered[0].answer);
  }
  form.addEventListener("change", (event) => { if (event.target.name === "stage") choose(); });

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const body = Object.fromEntries(new FormData(form));
    if (!body.text.trim()) { form.elements.text.focus(); return; }
    requests.stop("stopped");
    steps.replaceChildren();
    cards = [];
    place = 0;
    inside = null;
    sent = { ...body, seed: Number(body.seed) };
    status.textContent = "The model writes …";
    requests.send("rollout", sent, show, (why) => { status.textContent = why; });
  });

  // Adds a step. Those of GRPO that follow the completions fill in their cards.
  function show(event) {
    if (event.failed) {
      (inside?.shown ?? steps).append(make("p", { className: "failed", role: "alert" }, event.failed));
      return;
    }
    if (event.step === "inside") {
      inside ??= lookInside(event);
      inside.add(event);
      return;
    }
    place += 1;
    const section = make("section", { className: "rollout-part" }, make("h3", {}, `${place}. ${event.title}`), make("p", {}, event.about));
    const grid = steps.querySelector(".group");
    if (grid) grid.before(section);
    else steps.append(section);
    if (event.completions) {
      const items = event.completions.map(({ text, facts }) => make("li", {}, make("div", { className: "answer" }, text), make("p", { className: "facts soft" }, facts)));
      const list = make("ol", { className: event.step === "completions" ? "group" : "single" }, ...items);
      if (event.step === "completions") { cards = items; section.after(list); }
      else section.append(list);
    }
    if (event.step === "check") {
      const bars = measures("p", event.advantages, (value) => `advantage: ${signed(value)}`);
      cards.forEach((card, i) => {
        card.append(make("p", { className: "facts" }, event.rewards[i]), bars[i]);
        card.className = sign(event.advantages[i]);
      });
    }
    if (event.step === "update") {
      const bars = measures("p", event.changes.map((change) => change - 1), (value) => `${(value + 1).toFixed(2)} times as likely`);
      cards.forEach((card, i) => card.append(bars[i]));
    }
    if (event.step === "tokens") section.append(table(event));
  }

  // What is shown as 0 has no sign. A null is the NaN of a model that is broken.
  const sign = (value) => (Math.abs(value) < 0.005 ? "" : value > 0 ? "up" : "down");
  const signed = (value) => (value === null ? "?" : (value >= 0.005 ? "+" : "") + (sign(value) ? value : 0).toFixed(2).replace("-", "−"));

  const minus = (text) => text.replace("-", "−");
  const decimals = (value) => (value === null ? "?" : minus(value.toFixed(2).replace("-0.00", "0.00")));
  // Two significant digits, for numbers that are divided by hundreds of tokens.
  const digits = (value) => (value === null ? "?" : Math.abs(value) < 1e-6 ? "0" : minus(value.toPrecision(2)));
  // By how much a change of the log-probability multiplies the probability.
  const times = (change) => `${Math.exp(change).toFixed(2)} times`;

  // Numbers as elements, each with a bar whose length is relative to the largest number.
  function measures(name, values, label) {
    const largest = Math.max(...values.map(Math.abs)) || 1;
    return values.map((value) => make(name, { className: "measure" }, bar(Math.abs(value) / largest, sign(value)), make("span", {}, label(value))));
  }

  // What a tool wrote has a row without figures.
  function table({ tokens, chosen, logProbs, columns }) {
    // Soft hyphens, for a phone.
    const titles = ["Token", "Proba\u00adbility", ...Object.keys(columns).map((title) => title.replace("Advan", "Advan\u00ad"))];
    const shares = logProbs.map((logProb) => make("td", { className: "measure" }, bar(Math.exp(logProb)), make("span", {}, percent(logProb))));
    return grid(titles, tokens, [shares, ...Object.values(columns).map((values) => measures("td", values, signed))], chosen);
  }

  // A table with a row for each token. `columns` has its cells, which are left out where `isShown` is false.
  function grid(titles, tokens, columns, isShown) {
    const head = make("tr", {}, ...titles.map((title) => make("th", { scope: "col" }, title)));
    const rows = tokens.map((text, i) => make("tr", { className: isShown[i] ? "" : "soft" },
      make("th", { scope: "row" }, `“${text}”`), ...columns.map((column) => (isShown[i] ? column[i] : make("td")))));
    return make("table", { className: "tokens" }, make("thead", {}, head), make("tbody", {}, ...rows));
  }

  // The section Inside the update, below the completions. Returns what adds views to it: a view is what the server has
  // computed with one loss, for the first updates.
  function lookInside({ title, losses, advantages }) {
    const views = new Map(), numbers = [1, 2, 3, 4];
    const loss = make("select", {}, ...losses.map(([value, name]) => make("option", { value }, name)));
    const radios = numbers.map((number) => make("label", {}, make("input", { type: "radio", name: "update", value: number, checked: number === 1 }), ` ${number}`));
    const controls = make("form", { className: "row" }, make("label", {}, "Loss ", loss), make("fieldset", {}, make("legend", {}, "Update"), ...radios));
    const waiting = make("p", { className: "soft", role: "status" }), shown = make("div", {});
    const about = "Which tokens of a completion become more probable, and why. Choose a completion above. The trainer of the run takes up to "
      + "four updates with the same completions, each on a copy of the model, and with another loss if you like.";
    const section = make("section", { id: "inside", className: "rollout-part" },
      make("h3", {}, `${place + 1}. ${title}`), make("p", {}, about), controls, waiting, shown);
    steps.append(section);

    let attempt = advantages.indexOf(Math.max(...advantages));
    const buttons = cards.map((card, i) => {
      const button = make("button", { type: "button", className: "more", ariaLabel: `Show its tokens (completion ${i + 1})` }, "Show its tokens");
      card.append(button);
      card.addEventListener("click", () => {
        attempt = i;
        look();
        section.scrollIntoView({ block: "nearest" });
      });
      return button;
    });

    // Shows what was chosen, or asks the server for it.
    function look() {
      requests.stop("");
      if (draw()) return;
      const number = selected();
      waiting.textContent = number === 1 ? "An update is computed …" : `${number} updates are computed …`;
      requests.send("updates", { ...sent, loss: loss.value, updates: number }, show, (why) => { waiting.textContent = why; });
    }
    const selected = () => Number(controls.elements.update.value);
    // Returns whether the view that was chosen is there.
    function draw() {
      popover.hide();
      buttons.forEach((button, i) => { button.ariaPressed = i === attempt; });
      cards.forEach((card, i) => card.classList.toggle("chosen", i === attempt));
      waiting.textContent = "";
      shown.replaceChildren();
      const view = views.get(loss.value);
      if (!(view?.updates.length >= selected())) return false;
      shown.append(...updateOf(view, selected(), attempt));
      tabStop(shown);
      return true;
    }
    controls.addEventListener("change", look);
    controls.addEventListener("submit", (event) => event.preventDefault());
    return { shown, add: (view) => { views.set(view.loss, view); draw(); } };
  }

  // What one update does with the tokens of a completion.
  function updateOf({ yaml, formula, words, first, tokens, advantages, updates }, number, attempt) {
    const update = updates[number - 1];
    const columns = ["logProbs", "newLogProbs", "ratios", "clipped", "terms", "pushes"];
    const [logProbs, newLogProbs, ratios, clipped, terms, pushes] = columns.map((name) => update[name][attempt]);
    const texts = tokens[attempt], advantage = advantages[attempt];
    // What a tool wrote, and what is not learned from, has no numbers.
    const isLearned = logProbs.map((value) => value !== null);
    const changes = logProbs.map((value, i) => (isLearned[i] ? newLogProbs[i] - value : 0));
    const all = update.logProbs.flatMap((values, i) => values.map((value, j) => Math.abs(update.newLogProbs[i][j] - value)));
    // All completions have the same scale of colours, which does not magnify what is no change at all.
    const largest = Math.max(0.05, ...all);
    const coloured = (change, text, more = "") => {
      const kind = Math.abs(change) < 0.01 ? "" : change > 0 ? "up" : "down";
      const token = make("span", { className: `token shift ${kind} ${more}` }, text);
      token.style.setProperty("--share", `${100 * Math.sqrt(Math.abs(change) / largest)}%`);
      return token;
    };
    const tokenOf = (text, i) => {
      if (!isLearned[i]) return make("span", { className: "soft" }, text);
      const token = coloured(changes[i], text, clipped[i] ? "clipped" : "");
      token.tabIndex = -1;
      const rows = [
        ["Log-prob before", decimals(logProbs[i])], ["Log-prob after", decimals(newLogProbs[i])], ["Advantage", signed(advantage)],
        ["Ratio", decimals(ratios[i]) + (clipped[i] ? ", clipped" : "")], ["Term", digits(terms[i])], ["Push", digits(pushes[i])],
      ].map(([name, value]) => make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, value)));
      token.describe = () => [make("p", {}, `“${text}” becomes ${times(changes[i])} as likely.`), make("table", {}, make("tbody", {}, ...rows))];
      return token;
    };

    const legend = [-largest, -largest / 4, 0, largest / 4, largest].flatMap((change) => [coloured(change, change ? `${times(change)} as likely` : "unchanged"), " "]);
    const sum = (values) => values.reduce((total, value) => total + value, 0);
    const total = sum(update.terms.flat());
    const isWhole = Math.abs(total - update.loss) < 1e-5 + 1e-4 * Math.abs(total);
    const clippedCount = clipped.filter((isClipped, i) => isClipped && isLearned[i]).length;
    const facts = [
      `Completion ${attempt + 1} becomes ${times(sum(changes))} as likely in update ${number}.`,
      `${clippedCount} of its ${isLearned.filter(Boolean).length} tokens are clipped.`,
      `Its terms add up to ${digits(sum(terms))}, and those of all completions to ${digits(total)}`
        + (isWhole ? ", the loss." : `; the loss, ${digits(update.loss)}, also has a KL penalty or an entropy bonus.`),
      "Point at a token, or go to it with Tab and the arrow keys, to see its numbers.",
    ].join(" ");
    const push = "is how strongly the update raises the log-probability of the token: minus the derivative of the loss. What becomes "
      + "of it also depends on the other tokens, whose pushes change the same weights.";
    const explained = [["A, the advantage,", `is ${signed(advantage)} for all tokens of this completion.`], ...words, ["The push", push],
      number === 1 ? ["In the first update,", first] : [`In update ${number},`, "the ratios are what the earlier updates have made of each token."]];
    const cells = (values, text) => values.map((value, i) => make("td", {}, text(value, i)));
    return [
      make("div", { className: "answer", role: "group", ariaLabel: `Tokens of completion ${attempt + 1}` }, ...texts.map(tokenOf)),
      make("p", { className: "legend" }, ...legend, coloured(0, "clipped", "clipped")),
      make("p", {}, facts),
      make("p", {}, make("b", {}, `Term of a token = ${formula}`), make("span", { className: "soft" }, ` (${yaml})`)),
      make("ul", {}, ...explained.map(([name, text]) => make("li", {}, make("b", {}, name), ` ${text}`))),
      make("details", {}, make("summary", {}, "All tokens of this completion as a table"), grid(
        ["Token", "Log-prob before", "Log-prob after", "Ratio", "Term", "Push"], texts,
        [
          cells(logProbs, decimals), cells(newLogProbs, (value, i) => coloured(changes[i], decimals(value))),
          cells(ratios, (value, i) => decimals(value) + (clipped[i] ? " clipped" : "")), cells(terms, digits), measures("td", pushes, digits),
        ], isLearned)),
    ];
  }

  choose();
}
