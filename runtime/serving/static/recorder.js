// A voice from the microphone. Browsers give it to pages of localhost and of HTTPS alone.

import { $, refuse, show } from "./dom.js";
import { give } from "./form.js";

let recorder = null;

async function start(mostSeconds) {
  const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  const parts = [];
  recorder = new MediaRecorder(stream);
  recorder.ondataavailable = ({ data }) => parts.push(data);
  const limit = setTimeout(stop, mostSeconds * 1000);
  recorder.onstop = () => {
    clearTimeout(limit);
    for (const track of stream.getTracks()) track.stop();
    const type = recorder.mimeType.split(";")[0];
    give($("voice"), new File(parts, `recording.${type.split("/")[1]}`, { type }));
    recorder = null;
    label();
  };
  recorder.start();
  label();
}

function stop() {
  if (recorder?.state === "recording") recorder.stop();
}

function label() {
  $("record").textContent = recorder ? "Stop recording" : "Record";
  $("record").classList.toggle("recording", Boolean(recorder));
}

export function setUp() {
  show($("record"), Boolean(navigator.mediaDevices?.getUserMedia && window.MediaRecorder));
  $("record").onclick = async () => {
    if (recorder) return stop();
    try {
      await start(Number($("seconds").max) || 60);
    } catch (error) {
      refuse(`the microphone cannot be used: ${error.message}`);
    }
  };
}
