// ipywidgets' toggle buttons do not expose that they are pressed, and ignore arrow keys.
const mirror = () => document.querySelectorAll(".qv .widget-toggle-button").forEach(button => {
  const pressed = String(button.classList.contains("mod-active"));
  if (button.getAttribute("aria-pressed") !== pressed) button.setAttribute("aria-pressed", pressed);
});
const move = event => {
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  const word = event.target.closest?.(".qv-words button");
  if (!step || !word) return;
  const words = [...word.closest(".qv-words").querySelectorAll("button")];
  const next = words[words.indexOf(word) + step];
  next?.focus();
  next?.click();
  event.preventDefault();
  event.stopPropagation(); // in JupyterLab these keys would leave the cell
};
if (!window.qvisionObserver) { // one for all explorers of the page
  window.qvisionObserver = new MutationObserver(mirror);
  window.qvisionObserver.observe(document.body, {attributeFilter: ["class"], childList: true, subtree: true});
  document.addEventListener("keydown", move, true);
}
mirror();
