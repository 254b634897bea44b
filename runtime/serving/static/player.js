// The player: a video while it is made, through Media Source, and then the finished mp4.

import { call } from "./api.js";
import { $, once, show } from "./dom.js";

const video = $("video");
let waiting = null;  // the finished mp4, until the live one has been played to its end
let isFinished = false;

function load(address) {
  const before = video.src;
  video.src = address;
  URL.revokeObjectURL(before);
  show(video, true);
}

export function clear() {
  waiting = null;
  isFinished = false;
  if (video.src) URL.revokeObjectURL(video.src);
  video.removeAttribute("src");
  video.load();
  show(video, false);
}

// Plays the stream of a video as it comes. Does nothing where the browser cannot.
export async function playLive(id, signal) {
  const answer = await call(`/v1/videos/${id}/stream`, { signal });
  const type = answer.headers.get("Content-Type");
  if (isFinished || !window.MediaSource || !MediaSource.isTypeSupported(type)) {
    await answer.body.cancel();
    return;
  }
  const reader = answer.body.getReader();
  const source = new MediaSource();
  const opened = once(source, "sourceopen");
  load(URL.createObjectURL(source));
  await opened;
  const buffer = source.addSourceBuffer(type);
  video.play().catch(() => { /* not before somebody has clicked */ });
  for (;;) {
    const { value, done } = await reader.read();
    if (done || signal.aborted) break;
    const taken = once(buffer, "updateend");
    buffer.appendBuffer(value);
    await taken;
  }
  if (source.readyState === "open") source.endOfStream();
}

// Has the finished mp4 played from now on, or once what plays has come to its end.
export function finish(address) {
  isFinished = true;
  const at = video.ended ? 0 : video.currentTime;
  if (video.src && !video.error && !video.paused && !video.ended) waiting = address;
  else load(address);
  if (!waiting && at) video.currentTime = at;
}

video.addEventListener("play", () => {
  if (!waiting || video.currentTime > 0.1) return;  // it goes on, and does not begin again
  load(waiting);
  waiting = null;
  video.play().catch(() => { /* another video may be loaded by then */ });
});
