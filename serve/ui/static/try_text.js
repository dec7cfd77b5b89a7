// From a feature's page to a text's, with the text in the part of the address behind the #, which no server sees.
const form = document.querySelector("#try");
form.hidden = false;
form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = document.querySelector("#try-text").value;
  location.href = `${form.dataset.link}#${new URLSearchParams({ text, feature: form.dataset.feature })}`;
});
