// Calls `use` with an element once it is on the page: Gradio renders the page after it has loaded.
function whenReady(selector, use) {
  const found = document.querySelector(selector);
  if (found) return use(found);
  const watcher = new MutationObserver(() => {
    const later = document.querySelector(selector);
    if (later) { watcher.disconnect(); use(later); }
  });
  watcher.observe(document.documentElement, { childList: true, subtree: true });
}

// When the browser looks for the section that the address names, it is not there yet, and the page above it still grows.
// Keep the section in sight until the visitor moves.
whenReady("#report", () => {
  if (!/^#\w+$/.test(location.hash)) return;
  const show = () => document.querySelector(location.hash)?.scrollIntoView({ behavior: "instant" });
  const growing = new ResizeObserver(show);
  growing.observe(document.body);
  const leave = () => growing.disconnect();
  for (const kind of ["wheel", "touchstart", "keydown", "pointerdown"]) addEventListener(kind, leave, { once: true });
  setTimeout(leave, 10000);
});

// Gradio gives an id to the box around a field; scripts and tests look for the field.
whenReady("#prompt-box textarea", field => { field.id = "prompt"; });

// A token says how probable it was when it is pointed at, tapped or focused; arrow keys go from one to the next.
function inspect(event) {
  const token = event.target.closest?.(".token");
  const line = token && document.getElementById("inspect");
  if (line) line.textContent = token.dataset.about;
}
for (const kind of ["mouseover", "focusin", "click"]) document.addEventListener(kind, inspect);
document.addEventListener("keydown", event => {
  const token = event.target.closest?.(".token");
  const step = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
  const next = token && step && token[step];
  if (!next) return;
  token.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
  event.preventDefault();
});

// Gradio stops answers without saying so.
document.addEventListener("click", event => {
  if (event.target.closest?.("#stop")) setTimeout(() => {
    for (const line of document.querySelectorAll("#answers .soft")) {
      line.textContent = line.textContent.replace(/(writing|waiting for its first token)$/, "stopped");
    }
  }, 500);
});

// If the server ends in the middle of an answer, Gradio waits for the rest for ever: load the page again once it is back.
const plainFetch = window.fetch;
window.fetch = async (...request) => {
  const response = await plainFetch(...request);
  if (!response.body || !String(request[0]?.url ?? request[0]).includes("/queue/data")) return response;
  const [shown, watched] = response.body.tee();
  const reader = watched.getReader();
  const watch = () => reader.read().then(part => part.done || watch());
  watch().catch(error => error.name === "AbortError" || reload());
  return new Response(shown, response);
};
function reload() {
  plainFetch("config").then(answer => answer.ok && location.reload()).catch(() => setTimeout(reload, 1000));
}
