// What all sections share. `compare.js`, `voting.js` and `rollout.js` are loaded after it.
const byId = (id) => document.getElementById(id);
const LOST = "The connection is lost. Send again once the server is back.";

// Makes an element: make("p", {className: "soft"}, "text", child, ...). Text stays text.
function make(name, properties, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

// A probability in percent, of its logarithm; null is the NaN of a model that is broken.
const percent = (logProb) => (logProb === null ? "?" : Math.exp(logProb) >= 0.01 ? `${Math.round(100 * Math.exp(logProb))}%` : "<1%");

// A bar of a share from 0 to 1.
function bar(share, kind = "") {
  const element = make("span", { className: `bar ${kind}` });
  element.style.setProperty("--size", `${100 * share}%`);
  return element;
}

// Sends `body` as JSON. Resolves to the response, whatever its status.
function post(path, body, signal) {
  // The server cannot read half an emoji, which a text field can contain.
  const text = JSON.stringify(body, (key, value) => value?.toWellFormed?.() ?? value);
  return fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: text, signal });
}

// Why the server refused a request.
async function reason(response) {
  if (response.status === 401) return "Log in again: reload this page.";
  const text = await response.text();
  try { return String(JSON.parse(text).detail); } catch { return text || "The server refused this request."; }
}

// Requests whose answers come line by line. There is one at a time: what an older one still sends is dropped, so that
// nothing of its answer appears under another prompt.
class Streamed {
  constructor(stop) {
    this.stopButton = stop;
    stop.addEventListener("click", () => this.stop("stopped"));
  }

  // Calls `use` with each object of the answer, and `end` with why it ended, "" if it is whole. Stop the older one first.
  async send(path, body, use, end) {
    const request = (this.current = { controller: new AbortController(), end });
    this.stopButton.disabled = false;
    let why = "";
    try {
      const response = await post(path, body, request.controller.signal);
      if (!response.ok) throw Object.assign(new Error(await reason(response)), { refused: true });
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let rest = ""; ;) {
        const { done, value } = await reader.read();
        if (request !== this.current) return;
        if (done) break;
        const lines = (rest + value).split("\n");
        rest = lines.pop();
        for (const line of lines) use(JSON.parse(line));
      }
    } catch (error) {
      if (request !== this.current) return;
      // The browser's own words for a lost connection say little.
      why = error.refused ? error.message : LOST;
      if (!error.refused) console.error(error);
    }
    if (request === this.current) this.finish(why);
  }

  finish(why) {
    const { end } = this.current;
    this.current = null;
    this.stopButton.disabled = true;
    end(why);
  }

  stop(why) {
    if (!this.current) return;
    this.current.controller.abort();
    this.finish(why);
  }
}

// Enter sends a prompt, Shift+Enter begins a new line. Enter that ends a word of an input method does neither.
document.addEventListener("keydown", (event) => {
  if (!event.target.matches?.("textarea[name=text]") || event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  event.target.form.requestSubmit();
});

// A button with a prompt fills the form that it names, and sends it.
function fill(form, text, answer = "") {
  const fields = form.elements;
  fields.text.value = text;
  if (fields.answer) fields.answer.value = answer;
  form.dataset.answer = answer;
}
document.addEventListener("click", (event) => {
  const chip = event.target.closest?.("button[data-form]");
  if (!chip) return;
  const form = byId(chip.dataset.form);
  const next = chip.prompts?.[chip.turn++ % chip.prompts.length];
  fill(form, next?.text ?? chip.dataset.text, next?.answer);
  form.requestSubmit();
});

// The held-out prompts of the run: {key, kind, text, answer}. `offer` shows a button for each kind of those that `select`
// returns true for, which sends the next prompt of its kind at each click.
const prompts = post("prompts", {}).then((response) => (response.ok ? response.json() : [])).catch(() => []);
async function offer(formId, select) {
  const kinds = new Map();
  for (const prompt of (await prompts).filter(select)) kinds.set(prompt.kind, [...(kinds.get(prompt.kind) ?? []), prompt]);
  const chips = [...kinds].map(([kind, examples]) => {
    const title = `Send the next held-out prompt: ${examples[0].text}`;
    const chip = make("button", { type: "button", prompts: examples, turn: 0, title }, kind);
    chip.dataset.form = formId;
    return chip;
  });
  document.querySelector(`.may-ask[data-form="${formId}"] .chips`).replaceChildren(...chips);
  return [...kinds.values()].flat();
}

// Tokens of which more is known: `describe` of such an element returns what is shown beside it when it is pointed at or
// has the focus.
const popover = {
  element: byId("popover"),
  hide() { this.element.hidden = true; },
  show(token) {
    const { element } = this;
    element.replaceChildren(...token.describe());
    element.hidden = false;
    token.setAttribute("aria-describedby", "popover");
    // Below the token, or above it where there is no room.
    const box = token.getBoundingClientRect();
    const size = element.getBoundingClientRect();
    const below = box.bottom + size.height + 8 < innerHeight;
    element.style.left = `${Math.max(8, Math.min(box.left, document.documentElement.clientWidth - size.width - 8))}px`;
    element.style.top = `${below ? box.bottom + 4 : Math.max(8, box.top - size.height - 4)}px`;
  },
};
for (const kind of ["mouseover", "focusin", "click"]) {
  document.addEventListener(kind, ({ target, type }) => {
    if (target.closest?.("#popover")) return;
    const token = target.closest?.(".token");
    if (token?.describe) popover.show(token);
    else if (type !== "focusin") popover.hide();
  });
}
// A token that got the focus may have scrolled into view, with what is shown beside it.
addEventListener("scroll", () => {
  const token = document.activeElement.closest(".token");
  if (token && !popover.element.hidden) popover.show(token);
  else popover.hide();
}, { capture: true, passive: true });
// A text of tokens is one stop of the tabulator; arrow keys move on from there.
function tabStop(text) {
  if (!text.querySelector("[tabindex='0']")) text.querySelector(".token")?.setAttribute("tabindex", "0");
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") popover.hide();
  const token = event.target.closest?.(".token");
  const step = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
  let next = token && step && token[step];
  while (next && !next.matches(".token")) next = next[step];
  if (!next) return;
  event.preventDefault();
  token.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});

// The path and the chips may grow after the browser has gone to the section that the address names. Keep the section in
// sight until the visitor moves.
if (/^#\w+$/.test(location.hash)) {
  const growing = new ResizeObserver(() => document.querySelector(location.hash)?.scrollIntoView({ behavior: "instant" }));
  growing.observe(document.body);
  const leave = () => growing.disconnect();
  for (const kind of ["wheel", "touchstart", "keydown", "pointerdown"]) addEventListener(kind, leave, { once: true });
  setTimeout(leave, 5000);
}
