for (const button of document.querySelectorAll(".command button")) {
  const code = button.parentElement.querySelector("code");
  const select = () => {
    const range = document.createRange();
    range.selectNodeContents(code);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
  };
  button.hidden = false;
  button.addEventListener("click", async () => {
    let copied;
    try {
      await navigator.clipboard.writeText(code.textContent);
      copied = true;
    } catch {
      select();
      copied = document.execCommand("copy");
    }
    button.textContent = copied ? "Copied" : "Selected";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
}

// examples: only those of the chosen outcome and class
const filters = document.querySelector(".filters");
if (filters) {
  const shown = document.querySelector(".num-shown");
  const choose = () => {
    const [became, label] = [...filters.querySelectorAll("select")].map((one) => one.value);
    let number = 0;
    for (const one of document.querySelectorAll(".example")) {
      one.hidden = (became && one.dataset.became !== became) || (label && one.dataset.class !== label);
      number += !one.hidden;
    }
    for (const fold of document.querySelectorAll(".more-examples")) fold.open = true;
    shown.textContent = `${number} shown`;
  };
  for (const one of filters.querySelectorAll("select")) one.addEventListener("change", choose);
  filters.hidden = false;
}

// inside another page (sgm report --serve) links would leave this one
if (location.protocol === "about:") {
  for (const link of document.querySelectorAll("nav a")) {
    link.addEventListener("click", (event) => {
      event.preventDefault();
      document.getElementById(link.hash.slice(1)).scrollIntoView();
    });
  }
  for (const link of document.querySelectorAll(".files a")) link.removeAttribute("href");
}
