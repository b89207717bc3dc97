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

  // The editor of the inpainting tab is silent about files that are not images.
  const check = (files) => {
    document.querySelector("#file-error").textContent = "";
    for (const file of files) {
      createImageBitmap(file).catch(() => {
        document.querySelector("#file-error").textContent =
          "`" + file.name + "` is not an image that the browser can show";
      });
    }
  };
  document.addEventListener("change", (event) => {
    if (event.target.type === "file" && event.target.closest("#tab-inpaint")) check([...event.target.files]);
  }, true);
  document.addEventListener("drop", (event) => {
    if (event.target.closest("#tab-inpaint")) check([...event.dataTransfer.files]);
  }, true);

  const wide = window.matchMedia("(min-width: 900px)").matches;
  if (!wide) document.querySelector("#settings button.label-wrap.open")?.click();
  if (wide) document.querySelector(prompt)?.focus();
}
