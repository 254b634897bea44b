// The page: asks for videos and follows one at a time.

import { call, events } from "./api.js";
import { $, refuse, show } from "./dom.js";
import * as form from "./form.js";
import * as past from "./past.js";
import * as player from "./player.js";
import * as recorder from "./recorder.js";
import * as view from "./view.js";

const RETRY_MS = 1000;
let current = null;  // what is shown: { id, controller, isLive }
let shown = null;    // the address of its mp4

const draw = () => past.draw(current?.id, again);

function leave() {
  current?.controller.abort();
  current = null;
  player.clear();
  if (shown) URL.revokeObjectURL(shown);
  shown = null;
  show($("done"), false);
  view.asked("");
}

function forget() {
  leave();
  history.replaceState(null, "", location.pathname);
  show($("job"), false);
  show($("hint"), true);
  draw();
}

async function finish(id) {
  const video = await (await call(`/v1/videos/${id}`)).json();
  const blob = await (await call(`/v1/videos/${id}/content`)).blob();
  if (id !== current?.id) return;
  view.asked(video.prompt);  // which may have been rewritten
  shown = URL.createObjectURL(blob);
  view.done(video, shown);
  player.finish(URL.createObjectURL(blob));
}

function note(state) {
  view.state(state);
  if (past.note(state.id, state.status)) draw();
  if (state.frames && !current.isLive) {
    current.isLive = true;
    player.playLive(state.id, current.controller.signal).catch(() => { /* the mp4 comes yet */ });
  }
}

async function watch(id, signal) {
  for await (const { kind, data } of events(id, signal)) {
    if (id !== current?.id) return true;
    if (kind === "deleted") throw Object.assign(new Error(), { status: 404 });
    note(data);
    if (kind === "completed") await finish(id);
    if (kind === "completed" || kind === "failed") return true;
  }
  return false;  // the server stops
}

async function follow(id) {
  leave();
  const controller = new AbortController();
  current = { id, controller, isLive: false };
  const address = `#${id}`;
  if (location.hash !== address) history.replaceState(null, "", address);
  view.asked(past.find(id)?.asked.prompt || "");
  draw();
  while (current?.id === id && current.controller === controller) {
    try {
      if (!$("asked").textContent) view.asked((await (await call(`/v1/videos/${id}`)).json()).prompt);
      if (await watch(id, controller.signal)) return;
    } catch (error) {
      if (current?.controller !== controller) return;
      if (error.status === 404) {
        past.forget(id);
        forget();
        return refuse("this video is no longer on the server");
      }
      if (error.status === 401) return refuse(error.message);
    }
    $("status").textContent = "the server does not answer, trying again";
    show($("job"), true);
    await new Promise((wake) => setTimeout(wake, RETRY_MS));
  }
}

async function make() {
  const asked = form.values();
  const files = form.files();
  refuse("");
  $("make").disabled = true;
  try {
    const video = await (await call("/v1/videos", { method: "POST", body: form.body() })).json();
    past.add(video.id, { ...asked, seconds: video.seconds, size: video.size }, files);
    follow(video.id);
  } catch (error) {
    refuse(error.message);
  } finally {
    $("make").disabled = false;
  }
}

function again(video) {
  const files = past.files(video);
  form.fill(video.asked, files || {});
  form.randomSeed();
  if (files) return make();
  refuse("its image or voice is not kept: choose it again, then make the video");
}

async function remove() {
  const { id } = current;
  forget();
  past.forget(id);
  draw();
  try { await call(`/v1/videos/${id}`, { method: "DELETE" }); } catch (error) {
    if (error.status !== 404) refuse(error.message);
  }
}

function followAddress() {
  const id = location.hash.slice(1);
  if (!id.startsWith("video_") || id === current?.id) return;
  refuse("");
  follow(id);
}

form.setUp();
recorder.setUp();
$("form").onsubmit = (event) => { event.preventDefault(); make(); };
$("remove").onclick = remove;
$("again").onclick = async () => {
  const { id } = current;
  const known = past.find(id);
  if (known) return again(known);
  try {
    const video = await (await call(`/v1/videos/${id}`)).json();
    again({ id, files: [], asked: { ...form.values(), ...video, enhance: false } });
  } catch (error) { refuse(error.message); }
};
$("forget").onclick = () => { past.forget(); draw(); };
$("token").onchange = () => {
  sessionStorage.setItem("token", $("token").value);
  if (current) { refuse(""); follow(current.id); }
};
window.addEventListener("hashchange", followAddress);
draw();
followAddress();
