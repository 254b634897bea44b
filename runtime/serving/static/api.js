// Requests to the server, with its token where there is one.

import { $, show } from "./dom.js";

$("token").value = sessionStorage.getItem("token") || "";

export async function call(path, options = {}) {
  const headers = { ...options.headers };
  if ($("token").value) headers.Authorization = `Bearer ${$("token").value}`;
  const answer = await fetch(path, { ...options, headers });
  if (answer.ok) return answer;
  if (answer.status === 401) { show($("token-row"), true); $("token").focus(); }
  let message = `the server answered ${answer.status}`;
  try { message = (await answer.json()).error.message; } catch { /* not the server's own answer */ }
  throw Object.assign(new Error(message), { status: answer.status });
}

// The events of a video, as { kind, data }. EventSource can send no token.
export async function* events(id, signal) {
  const answer = await call(`/v1/videos/${id}/events`, { signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n").map((line) => [line.split(": ", 1)[0], line.slice(line.indexOf(": ") + 2)]);
      const fields = Object.fromEntries(lines);
      if (fields.data) yield { kind: fields.event, data: JSON.parse(fields.data) };
    }
  }
}
