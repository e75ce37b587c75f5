// Calls `use` with the element once it is on the page, which Gradio renders after it has loaded.
function whenReady(selector, use) {
  const found = document.querySelector(selector);
  if (found) return use(found);
  const watcher = new MutationObserver(() => {
    const later = document.querySelector(selector);
    if (later) { watcher.disconnect(); use(later); }
  });
  watcher.observe(document.documentElement, { childList: true, subtree: true });
}
