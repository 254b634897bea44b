// The form: what is asked for, with files that are chosen, dropped or recorded.

import { $, refuse, show } from "./dom.js";

const FIELDS = ["prompt", "seconds", "size", "seed"];
const OPTIONAL = ["num_inference_steps", "guidance_scale", "negative_prompt"];
const FILES = { input_reference: "image", audio: "voice" };  // their fields, and their inputs
const PREVIEWS = { image: "face", voice: "listen" };

export function values() {
  const texts = [...FIELDS, ...OPTIONAL].map((name) => [name, $(name).value]);
  return { ...Object.fromEntries(texts), enhance: $("enhance").checked };
}

export function files() {
  const chosen = Object.entries(FILES).map(([field, name]) => [field, $(name).files[0]]);
  return Object.fromEntries(chosen.filter(([, file]) => file));
}

// The form as it is, as the body of a request.
export function body() {
  const form = new FormData();
  const asked = values();
  for (const name of FIELDS) form.append(name, asked[name]);
  for (const name of OPTIONAL) if (asked[name]) form.append(name, asked[name]);
  if (asked.enhance) form.append("enhance", "true");
  for (const [name, file] of Object.entries(files())) form.append(name, file);
  return form;
}

export function fill(asked, given = {}) {
  for (const name of [...FIELDS, ...OPTIONAL]) $(name).value = asked[name] ?? "";
  $("enhance").checked = Boolean(asked.enhance);
  $("more").open = OPTIONAL.some((name) => $(name).value);
  for (const [field, name] of Object.entries(FILES)) give($(name), given[field]);
}

export function randomSeed() {
  $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
}

// Puts a file into an input, or none.
export function give(input, file) {
  const chosen = new DataTransfer();
  if (file) chosen.items.add(file);
  input.files = chosen.files;
  preview(input);
}

function preview(input) {
  const element = $(PREVIEWS[input.id]);
  const [file] = input.files;
  URL.revokeObjectURL(element.src);
  show(element, Boolean(file));
  show($(`${input.id}-clear`), Boolean(file));
  if (file) element.src = URL.createObjectURL(file);
  else element.removeAttribute("src");
}

function drop(files) {
  for (const file of files) {
    if (file.type.startsWith("image/")) give($("image"), file);
    else if (file.type.startsWith("audio/") || file.type.startsWith("video/")) give($("voice"), file);
    else refuse(`an image or a sound can be dropped here, and ${file.name} is neither`);
  }
}

function setUpDropping() {
  const dragging = (is) => document.body.classList.toggle("dragging", is);
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    dragging(true);
  });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) dragging(false); });
  document.addEventListener("drop", (event) => {
    dragging(false);
    if (!hasFiles(event)) return;
    event.preventDefault();
    refuse("");
    drop(event.dataTransfer.files);
  });
}

export function setUp() {
  for (const name of Object.keys(PREVIEWS)) {
    $(name).onchange = () => preview($(name));
    $(`${name}-clear`).onclick = () => { give($(name)); $(name).focus(); };
  }
  $("random").onclick = randomSeed;
  $("examples").onchange = () => {
    if ($("examples").value) $("prompt").value = $("examples").value;
    $("examples").value = "";
  };
  $("form").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    if (!$("make").disabled) $("form").requestSubmit($("make"));
  });
  setUpDropping();
}
