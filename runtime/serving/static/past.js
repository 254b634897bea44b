// What was asked for in this browser. It is kept here alone, without images and voices.

import { $, made, show } from "./dom.js";

const KEY = "magihuman-videos";
const MOST = 50;
const given = new Map();  // images and voices, until the page is left
let videos = [];
try { videos = JSON.parse(localStorage.getItem(KEY)) || []; } catch { /* none that can be read */ }

function changed() {
  try { localStorage.setItem(KEY, JSON.stringify(videos)); } catch { /* not kept, then */ }
}

export function add(id, asked, files) {
  given.set(id, files);
  videos = [{ id, asked, files: Object.keys(files), status: "queued" }, ...videos].slice(0, MOST);
  changed();
}

export function note(id, status) {
  const video = find(id);
  if (!video || video.status === status) return false;
  video.status = status;
  changed();
  return true;
}

export function forget(id) {
  videos = id ? videos.filter((video) => video.id !== id) : [];
  changed();
}

export const find = (id) => videos.find((video) => video.id === id);

// The files that a video was asked for with; null where they are not there any more.
export function files(video) {
  const known = given.get(video.id) || {};
  return video.files.every((name) => known[name]) ? known : null;
}

function row(video, current, again) {
  const { prompt, seconds, size, seed } = video.asked;
  const link = made("a", { href: `#${video.id}`, textContent: prompt, title: prompt });
  if (video.id === current) link.setAttribute("aria-current", "true");
  const told = `${seconds} s, ${size}, seed ${seed}, ${video.status.replace("_", " ")}`;
  const button = made("button", { type: "button", className: "quiet", textContent: "Again" });
  button.setAttribute("aria-label", `Again with another seed: ${prompt}`);
  button.onclick = () => again(video);
  return made("li", {}, link, made("span", { className: "note", textContent: told }), button);
}

export function draw(current, again) {
  $("history").replaceChildren(...videos.map((video) => row(video, current, again)));
  show($("past"), videos.length > 0);
}
