// The calculator of docs/sizing.md: shows the rows of sizing.js for what the form says.
{
  const form = document.querySelector("#sizing-form");
  const measured = JSON.parse(document.querySelector("#sizing-measured").textContent);
  const [needed, first] = document.querySelectorAll("#sizing-needs, #sizing-first");

  function fill(body, rows) {
    body.replaceChildren(...rows.map((cells) => {
      const row = document.createElement("tr");
      row.append(...cells.map((text) => Object.assign(document.createElement("td"), { textContent: text })));
      return row;
    }));
  }

  function show() {
    if (!form.checkValidity()) return;
    const input = Object.fromEntries([...new FormData(form)].map(([name, value]) => [name, Number(value)]));
    input.share /= 100;
    const needs = size(input, measured);
    fill(needed, ROWS.map(([what, text]) => [what, text(needs)]));
    fill(first, limits(input, measured).map(([what, share]) => [what, `${rounded(share * 100)} %`]));
  }

  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  show();
}
