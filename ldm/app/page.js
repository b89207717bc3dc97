// Runs once when the page has been built.
() => {
  const prompt = "#prompt textarea, #negative textarea";
  document.body.dataset.tab = "txt2img";

  // Without this, the gallery takes the focus from the prompt, and scrolls, at every new image.
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
    "random-seed": "Random seed", "reuse-seed-icon": "Seed of the selected image",
    "paste": "Take parameters from the prompt field, else from the selected image",
  };
  for (const [id, title] of Object.entries(titles)) document.getElementById(id).title = title;

  const showNote = (text) => { document.querySelector("#browser-note").textContent = text; };

  // Report files that are not images, as gradio's editor does not, and pass on the size of others.
  const checkImages = (files) => {
    showNote("");
    for (const file of files) {
      createImageBitmap(file).then((image) => {
        const size = document.querySelector("#sketch-size textarea, #sketch-size input");
        size.value = image.width + "x" + image.height;
        size.dispatchEvent(new Event("input", { bubbles: true }));
      }, () => showNote("`" + file.name + "` is not an image that the browser can show"));
    }
  };
  document.addEventListener("change", (event) => {
    if (event.target.type === "file" && event.target.closest("#tab-inpaint")) checkImages([...event.target.files]);
  }, true);
  document.addEventListener("drop", (event) => {
    if (event.target.closest("#tab-inpaint")) checkImages([...event.dataTransfer.files]);
  }, true);
  document.addEventListener("paste", (event) => {
    if (document.body.dataset.tab === "inpaint") checkImages([...event.clipboardData.files]);
  }, true);

  // gradio's sliders clamp a number without a message.
  document.addEventListener("change", ({ target }) => {
    if (!target.matches("#main input[type=number][max]")) return;
    const label = target.ariaLabel.replace("number input for ", "");
    const [value, low, high] = [target.value, target.min, target.max].map(Number);
    const bound = Math.min(Math.max(value, low), high);
    showNote(value === bound ? "" : label + ": " + low + " to " + high + " are allowed, " + value + " became " + bound);
  }, true);

  const isWide = window.matchMedia("(min-width: 900px)").matches;
  if (!isWide) document.querySelector("#settings button.label-wrap.open")?.click();
  if (isWide) document.querySelector(prompt)?.focus();
}
