// How a video is shown: its state, and once it is finished, its figures.

import { $, made, show } from "./dom.js";

const STAGES = {
  prepare: "opening the inputs", queue: "waiting for the engine", text: "reading the prompt",
  denoise: "denoising", super_resolve: "super-resolution", decode_video: "decoding frames",
  decode_audio: "decoding sound", write: "writing the file",
};

function about(seconds) {
  if (seconds < 90) return `about ${Math.max(1, Math.round(seconds))} s left`;
  return `about ${Math.round(seconds / 60)} min left`;
}

function left(state) {
  const parts = [];
  if (state.place) parts.push(state.place === 1 ? "next in line" : `number ${state.place} in line`);
  if (state.stage && state.steps) {
    const unit = state.stage === "decode_video" ? "frame" : "step";
    parts.push(`${unit} ${state.step} of ${state.steps}`);
  }
  if (state.seconds_left != null) parts.push(about(state.seconds_left));
  return parts.join(", ");
}

export function state(now) {
  const stage = now.stage ? ` - ${STAGES[now.stage] || now.stage}` : "";
  const told = now.status.replace("_", " ") + stage;
  if ($("status").textContent !== told) $("status").textContent = told;  // said aloud once
  $("progress").value = now.progress;
  const hasEnded = now.status === "completed" || now.status === "failed";
  $("remove").textContent = hasEnded ? "Remove" : "Cancel";
  $("left").textContent = left(now);
  show($("left"), Boolean($("left").textContent));
  show($("failed"), now.status === "failed");
  $("failed").textContent = now.error ? now.error.message : "";
  show($("hint"), false);
  show($("job"), true);
}

export function asked(prompt) {
  $("asked").textContent = prompt;
}

export function done(video, address) {
  $("download").href = address;
  $("download").download = `${video.id}.mp4`;
  $("warnings").replaceChildren(...video.warnings.map((text) => made("li", { textContent: text })));
  show($("warnings"), video.warnings.length > 0);
  bars(video.timings_s);
  show($("done"), true);
}

function bars(timings) {
  const longest = Math.max(...Object.values(timings), 1e-9);
  $("bars").replaceChildren(...Object.entries(timings).flatMap(([stage, seconds]) => {
    const bar = made("i");
    bar.style.width = `${100 * seconds / longest}%`;
    return [
      made("span", { textContent: stage }),
      made("div", { className: "track" }, bar),
      made("b", { textContent: seconds.toFixed(3) }),
    ];
  }));
}
