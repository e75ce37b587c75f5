// The section Watch a rollout: sends a prompt, and shows the steps as they are made.
if (byId("rollout-form")) {
  const form = byId("rollout-form"), steps = byId("rollout-shown"), status = byId("rollout-status");
  const requests = new Streamed(byId("rollout-stop"));
  let cards = [], place = 0;

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
    status.textContent = "The model writes …";
    requests.send("rollout", { ...body, seed: Number(body.seed) }, show, (why) => { status.textContent = why; });
  });

  // Adds a step. Those of GRPO that follow the completions fill in their cards.
  function show(event) {
    if (event.failed) {
      steps.append(make("p", { className: "failed", role: "alert" }, event.failed));
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

  // Numbers as elements, each with a bar whose length is relative to the largest number.
  function measures(name, values, label) {
    const largest = Math.max(...values.map(Math.abs)) || 1;
    return values.map((value) => make(name, { className: "measure" }, bar(Math.abs(value) / largest, sign(value)), make("span", {}, label(value))));
  }

  // What a tool wrote has a row without figures.
  function table({ tokens, chosen, logProbs, columns }) {
    // Soft hyphens, for a phone.
    const titles = ["Token", "Proba\u00adbility", ...Object.keys(columns).map((title) => title.replace("Advan", "Advan\u00ad"))];
    const head = make("tr", {}, ...titles.map((title) => make("th", { scope: "col" }, title)));
    const shares = logProbs.map((logProb) => make("td", { className: "measure" }, bar(Math.exp(logProb)), make("span", {}, percent(logProb))));
    const cells = [shares, ...Object.values(columns).map((values) => measures("td", values, signed))];
    const rows = tokens.map((text, i) => make("tr", { className: chosen[i] ? "" : "soft" },
      make("th", { scope: "row" }, `“${text}”`), ...cells.map((column) => (chosen[i] ? column[i] : make("td")))));
    return make("table", { className: "tokens" }, make("thead", {}, head), make("tbody", {}, ...rows));
  }

  choose();
}
