// A voice as it is spoken: of the microphone, or of a file at the speed of its clock.

const BLOCK_MS = 100;

// 16 bits a sample, the lower ones first, as the server takes them.
function samples(block) {
  const view = new DataView(new ArrayBuffer(2 * block.length));
  block.forEach((value, index) => {
    view.setInt16(2 * index, Math.max(-32768, Math.min(32767, Math.round(value * 32767))), true);
  });
  return view.buffer;
}

// Each source has a rate, start(send, end) and stop(). Browsers give the microphone to pages of
// localhost and of HTTPS alone.
export async function microphone() {
  const stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1 } });
  const context = new AudioContext();
  await context.audioWorklet.addModule("static/worklet.js");
  const tap = new AudioWorkletNode(context, "tap", { numberOfOutputs: 0 });
  let held = [];
  let count = 0;
  return {
    rate: context.sampleRate,
    start(send) {
      tap.port.onmessage = ({ data }) => {
        held.push(data);
        count += data.length;
        if (count < context.sampleRate * BLOCK_MS / 1000) return;
        send(samples(held.flatMap((block) => [...block])));
        held = [];
        count = 0;
      };
      context.createMediaStreamSource(stream).connect(tap);
      context.resume();
    },
    stop() {
      tap.port.onmessage = null;
      for (const track of stream.getTracks()) track.stop();
      if (context.state !== "closed") context.close();
    },
  };
}

export async function recording(file) {
  const context = new OfflineAudioContext(1, 1, 48000);
  const sound = await context.decodeAudioData(await file.arrayBuffer());
  const mono = new Float32Array(sound.length);
  for (let channel = 0; channel < sound.numberOfChannels; channel++) {
    sound.getChannelData(channel).forEach((value, index) => {
      mono[index] += value / sound.numberOfChannels;
    });
  }
  let timer = null;
  return {
    rate: sound.sampleRate,
    start(send, end) {
      const begun = performance.now();
      let sent = 0;
      timer = setInterval(() => {
        const spoken = Math.min(mono.length, Math.floor((performance.now() - begun) * sound.sampleRate / 1000));
        while (sent < spoken) {  // a page in the background is woken once a second
          const next = Math.min(spoken, sent + sound.sampleRate);
          send(samples(mono.subarray(sent, next)));
          sent = next;
        }
        if (sent === mono.length) { clearInterval(timer); end(); }
      }, BLOCK_MS);
    },
    stop() { clearInterval(timer); },
  };
}
