// Pictures of one kind: a slider over the steps. Without JavaScript they stand in a row.
for (const frames of document.querySelectorAll(".frames")) {
  const figures = [...frames.querySelectorAll("figure")];
  const stepper = frames.querySelector(".stepper");
  if (figures.length < 2) continue;
  const slider = stepper.querySelector("input");
  const [back, on] = stepper.querySelectorAll("button");
  const show = () => {
    const now = Number(slider.value);
    figures.forEach((figure, i) => figure.classList.toggle("now", i === now));
    stepper.querySelector("output").value = figures[now].dataset.step;
    slider.setAttribute("aria-valuetext", figures[now].dataset.step);
  };
  const move = (by) => { slider.value = Number(slider.value) + by; show(); };
  slider.max = figures.length - 1;
  slider.value = slider.max;
  slider.addEventListener("input", show);
  back.addEventListener("click", () => move(-1));
  on.addEventListener("click", () => move(1));
  frames.classList.add("stepped");
  stepper.hidden = false;
  show();
}
