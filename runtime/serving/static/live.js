// The page of a face that answers: a voice to the server, and what comes back into the player.

import { $, once, refuse, show } from "./dom.js";
import { microphone, recording } from "./voice.js";

const KEPT_S = 20;    // of what has been played
const BEHIND_S = 5;   // further behind what has come, the player jumps
const video = $("video");
let current = null;   // the talk: { socket, source, player }

// Media Source, fed one piece at a time.
class Player {
  constructor(type) {
    this.pieces = [];
    this.isEnded = false;
    this.source = new MediaSource();
    const before = video.src;
    video.src = URL.createObjectURL(this.source);
    URL.revokeObjectURL(before);
    once(this.source, "sourceopen").then(() => {
      this.buffer = this.source.addSourceBuffer(type);
      this.buffer.onupdateend = () => this.next();
      this.next();
      video.play().catch(() => { /* not before somebody has clicked */ });
    });
  }

  add(piece) {
    this.pieces.push(piece);
    this.next();
  }

  end() {
    this.isEnded = true;
    this.next();
  }

  next() {
    if (!this.buffer || this.buffer.updating || this.source.readyState !== "open") return;
    const { buffered } = video;
    const last = buffered.length ? buffered.end(buffered.length - 1) : 0;
    if (!video.paused && last - video.currentTime > BEHIND_S) video.currentTime = last - 1;
    if (this.pieces.length) {
      this.buffer.appendBuffer(this.pieces.shift());
    } else if (this.isEnded) {
      this.source.endOfStream();
    } else if (buffered.length && video.currentTime - buffered.start(0) > 2 * KEPT_S) {
      this.buffer.remove(0, video.currentTime - KEPT_S);
    }
  }
}

function note(message) {
  if (message.type === "ready") {
    $("status").textContent = "listening";
    current.source.start(
      (block) => send(block),
      () => send(JSON.stringify({ type: "end" })),
    );
  } else if (message.type === "stream") {
    current.player = new Player(message.media_type);
    $("status").textContent = "speaking";
  } else if (message.type === "window") {
    const late = message.repeated ? ", frames repeated" : message.late ? ", late" : "";
    $("delay").textContent = `${message.delay_s.toFixed(1)} s behind the voice${late}`;
  } else if (message.type === "end") {
    leave("ended");
  } else if (message.type === "error") {
    if (message.error.code === "invalid_token") { show($("token-row"), true); $("token").focus(); }
    leave("ended");
    refuse(message.error.message);
  }
}

function send(data) {
  if (current?.socket.readyState === WebSocket.OPEN) current.socket.send(data);
}

function leave(status) {
  if (!current) return;
  const { socket, source, player } = current;
  current = null;
  source.stop();
  player?.end();
  socket.close();
  $("status").textContent = status;
  $("talk").disabled = false;
  show($("stop"), false);
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

async function talk() {
  refuse("");
  $("talk").disabled = true;
  let source = null;
  try {
    source = await ($("voice").files.length ? recording($("voice").files[0]) : microphone());
    const opening = {
      image: await dataUrl($("image").files[0]),
      sample_rate: source.rate,
      size: $("size").value,
    };
    if ($("prompt").value.trim()) opening.prompt = $("prompt").value;
    if ($("token").value) opening.token = $("token").value;
    const address = new URL("v1/live", location.href);
    address.protocol = address.protocol.replace("http", "ws");
    const socket = new WebSocket(address);
    socket.binaryType = "arraybuffer";
    current = { socket, source, player: null };
    socket.onopen = () => socket.send(JSON.stringify(opening));
    socket.onmessage = ({ data }) => {
      if (socket !== current?.socket) return;
      if (typeof data === "string") note(JSON.parse(data));
      else current.player.add(data);
    };
    socket.onclose = () => {
      if (socket !== current?.socket) return;
      leave("ended");
      refuse("the server has ended the talk");
    };
    $("status").textContent = "getting ready";
    $("delay").textContent = "";
    show($("hint"), false);
    show($("seen"), true);
    show($("stop"), true);
  } catch (error) {
    source?.stop();
    $("talk").disabled = false;
    refuse(`the voice cannot be had: ${error.message}`);
  }
}

$("token").value = sessionStorage.getItem("token") || "";
$("token").onchange = () => sessionStorage.setItem("token", $("token").value);
$("examples").onchange = () => { $("prompt").value = $("examples").value; $("examples").value = ""; };
$("image").onchange = () => {
  const before = $("face").src;
  const file = $("image").files[0];
  if (file) $("face").src = URL.createObjectURL(file);
  show($("face"), Boolean(file));
  if (before) URL.revokeObjectURL(before);
};
$("form").onsubmit = (event) => { event.preventDefault(); talk(); };
$("stop").onclick = () => leave("stopped");
