// Loads the networks with LiteRT.js and times them in turns. Everything comes from this server.
import {loadAndCompile, loadLiteRt, Tensor} from "@litertjs/core";

const read = async (name) => {
  const answer = await fetch("/data/" + name);
  if (!answer.ok) throw new Error(`${name}: ${answer.status}`);
  return answer;
};

// Returns the images and the networks; each network has a function from an input to its logits.
export async function open(say) {
  const data = await (await read("networks.json")).json();
  const inputs = new Float32Array(await (await read("inputs.bin")).arrayBuffer());
  const pixels = new Uint8Array(await (await read("pixels.bin")).arrayBuffer());
  say("LiteRT.js is loading");
  // One thread, and a build that every browser with WebAssembly runs.
  await loadLiteRt("/litert/core/wasm/litert_wasm_internal.js");
  const size = data.shape.reduce((a, b) => a * b);
  const shape = [1, ...data.shape];
  for (const network of data.networks) {
    say(network.name + " is loading");
    const options = {accelerator: "wasm", cpuOptions: {numThreads: 1}};
    const model = await loadAndCompile("/data/" + network.file, options);
    const tensors = data.labels.map(
      (_, image) => new Tensor(inputs.slice(image * size, (image + 1) * size), shape));
    network.ms = [];
    network.run = async (image) => {
      const start = performance.now();
      const outputs = await model.run([tensors[image]]);
      const logits = Array.from(await outputs[0].data());
      const ms = performance.now() - start;
      outputs.forEach((output) => output.delete());
      return {logits, ms};
    };
  }
  return {...data, imagePixels: pixels};
}

// Runs every network once, in turn, and keeps the milliseconds of each.
export async function round(data, image) {
  for (const network of data.networks) {
    const {logits, ms} = await network.run(image);
    network.ms.push(ms);
    network.last = logits;
  }
}

// Returns the value below which a fraction of the numbers lies.
export function quantile(values, fraction) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.floor((sorted.length - 1) * fraction)];
}

// Measures in rounds, checks all images against JAX, and sends the result to the server.
export async function report(data, rounds) {
  for (let index = 0; index < 20; index++) await round(data, 0);  // the compiler warms up
  for (const network of data.networks) network.ms = [];
  for (let index = 0; index < rounds; index++) await round(data, 0);
  const networks = [];
  for (const network of data.networks) {
    const predictions = [];
    let error = 0;
    for (let image = 0; image < data.labels.length; image++) {
      const {logits} = await network.run(image);
      predictions.push(logits.indexOf(Math.max(...logits)));
      network.logits[image].forEach((own, index) => {
        error = Math.max(error, Math.abs(own - logits[index]));
      });
    }
    networks.push({name: network.name, ms: network.ms, error, predictions});
  }
  await send({networks, rounds, isolated: crossOriginIsolated, agent: navigator.userAgent,
              requests: performance.getEntriesByType("resource").map((entry) => entry.name)});
}

export const send = (message) =>
  fetch("/result", {method: "POST", body: JSON.stringify(message)});
