// Runs once when the page has been built.
() => {
  const prompt = "#prompt textarea, #negative textarea";
  document.body.dataset.tab = "txt2img";

  // The gallery would take the focus away from the prompt, and scroll, at every new image.
  const focus = HTMLElement.prototype.focus;
  HTMLElement.prototype.focus = function (options) {
    if (this.closest("#gallery") && !document.activeElement?.closest("#gallery")) return;
    focus.call(this, options);
  };

  document.addEventListener("keydown", (event) => {
    const hasModifier = event.ctrlKey || event.altKey || event.metaKey;
    if (event.key === "Enter" && hasModifier && event.target.closest("#main")) {
      event.preventDefault();
      event.stopPropagation();
      document.querySelector("#generate").click();
    }
    if (event.key === "X" && event.shiftKey && !event.target.closest("textarea, input")) {
      document.querySelector("#stop").click();
    }
  }, true);

  const titles = {
    "refresh": "Read the models folder again", "swap": "Swap width and height",
    "any-seed": "Random seed", "reuse-seed": "Seed of the chosen image",
    "paste": "Take parameters from the prompt field, or else of the chosen image",
  };
  for (const [id, title] of Object.entries(titles)) document.getElementById(id).title = title;

  const say = (text) => { document.querySelector("#browser-note").textContent = text; };

  // The editor of the inpainting tab is silent about files that are not images.
  const check = (files) => {
    say("");
    for (const file of files) {
      createImageBitmap(file).then((image) => {
        const size = document.querySelector("#sketch-size textarea, #sketch-size input");
        size.value = image.width + "x" + image.height;
        size.dispatchEvent(new Event("input", { bubbles: true }));
      }, () => say("`" + file.name + "` is not an image that the browser can show"));
    }
  };
  document.addEventListener("change", (event) => {
    if (event.target.type === "file" && event.target.closest("#tab-inpaint")) check([...event.target.files]);
  }, true);
  document.addEventListener("drop", (event) => {
    if (event.target.closest("#tab-inpaint")) check([...event.dataTransfer.files]);
  }, true);
  document.addEventListener("paste", (event) => {
    if (document.body.dataset.tab === "inpaint") check([...event.clipboardData.files]);
  }, true);

  // A slider silently brings a number back into its bounds.
  document.addEventListener("change", ({ target }) => {
    if (!target.matches("#main input[type=number][max]")) return;
    const label = target.ariaLabel.replace("number input for ", "");
    const [value, low, high] = [target.value, target.min, target.max].map(Number);
    const bound = Math.min(Math.max(value, low), high);
    say(value === bound ? "" : label + ": " + low + " to " + high + " are allowed, " + value + " became " + bound);
  }, true);

  const wide = window.matchMedia("(min-width: 900px)").matches;
  if (!wide) document.querySelector("#settings button.label-wrap.open")?.click();
  if (wide) document.querySelector(prompt)?.focus();
}
