// Asks for the parts of the page that have changed, and keeps what the reader has chosen in them: hidden curves, the
// place in a plot, unfolded answers, the focus.

const EVERY = 2000, sections = [...document.querySelectorAll("main > section")];
const pause = document.getElementById("pause"), connection = document.getElementById("connection");
const focusable = "a[href], button, summary, [tabindex]";
const titleOf = figure => figure.querySelector("svg").getAttribute("aria-label");

function replace(section, part) {
  const kept = new Map([...section.querySelectorAll("figure")].map(figure => [titleOf(figure), figure.kept()]));
  const open = new Set([...section.querySelectorAll("details[open]")].map(each => each.dataset.key));
  const focused = [...section.querySelectorAll(focusable)].indexOf(document.activeElement);
  section.innerHTML = part.html;
  section.dataset.hash = part.hash;
  for (const details of section.querySelectorAll("details")) details.open = open.has(details.dataset.key);
  for (const figure of section.querySelectorAll("figure")) readOut(figure, kept.get(titleOf(figure)));
  const now = focused < 0 ? undefined : section.querySelectorAll(focusable)[focused];
  if (now) now.focus({ preventScroll: true });
}

function say(text, lost) {
  if (connection.textContent !== text) connection.textContent = text;
  connection.classList.toggle("lost", lost);
}

let asking = false;
async function update() {
  if (asking || document.hidden || pause.getAttribute("aria-pressed") === "true") return;
  asking = true;
  try {
    const seen = sections.map(section => section.dataset.hash).join(",");
    const answer = await fetch(`state?seen=${seen}`, { cache: "no-store" });
    if (!answer.ok) throw new Error(answer.status);
    const found = await answer.json();
    document.title = found.title;
    for (const section of sections) if (found.parts[section.id]) replace(section, found.parts[section.id]);
    say(found.says, false);
  } catch {
    say(`No longer updated since ${new Date().toLocaleTimeString()}: \`preceptor watch\` has ended.`, true);
  } finally {
    asking = false;
  }
}

pause.addEventListener("click", () => {
  const paused = pause.getAttribute("aria-pressed") !== "true";
  pause.setAttribute("aria-pressed", String(paused));
  pause.textContent = paused ? "Go on" : "Pause";
  if (paused) say("Paused.", false); else update();
});
document.addEventListener("visibilitychange", update);
setInterval(update, EVERY);
