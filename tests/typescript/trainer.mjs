// Trains through the TypeScript client until its standard input ends, whatever happens to the server meanwhile.
//
//     node trainer.mjs CLIENT JOB.json
//
// Prints one JSON object a line: each step it made, with its ids and contributions, and what it was answered; at the end
// whether every step is durable, and the counters. A job: {"address", "options", "seed", "pauseMs", "rows"}.
import { readFileSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import { pathToFileURL } from "node:url";

const [folder, path] = process.argv.slice(2);
const { PolicyClient } = await import(pathToFileURL(`${folder}/dist/index.js`).href);
const { address, options, seed, pauseMs, rows } = JSON.parse(readFileSync(path, "utf8"));
const print = (value) => process.stdout.write(`${JSON.stringify(value)}\n`);
const base64 = (array) => Buffer.from(array.buffer).toString("base64");

let state = seed;
/** Uniform in [0, 1): a linear congruential generator is random enough to tell one step from another. */
const random = () => (state = (state * 1664525 + 1013904223) % 2 ** 32) / 2 ** 32;

let stopping = false;
process.stdin.on("end", () => (stopping = true)).resume();

const client = await PolicyClient.open(address, options);
let made = 0;

async function step(submits) {
  const count = 1 + Math.floor(random() * rows);
  const ids = BigUint64Array.from({ length: count }, () => BigInt(Math.floor(random() * options.numExamples)));
  const contributions = Float32Array.from({ length: count }, () => random() - 0.5);
  const number = ++made;
  const sent = { step: number, ids: base64(ids), contributions: base64(contributions) };
  if (submits) {
    if (!client.submit(ids, { contributions })) throw new Error("the window is full");
    print(sent);
    return;
  }
  const result = await client.step(ids, { contributions });
  print({ ...sent, ...result, weights: base64(result.weights) });
  if (result.source !== "served") await sleep(20); // a log full of steps made without a server takes long to replay
}

while (!stopping) {
  const kind = random();
  if (kind < 0.6) await step(false);
  else if (kind < 0.8) await step(true);
  else await Promise.all([step(false), step(false), step(false)]);
  await sleep(pauseMs * random());
}
print({ durable: await client.close({ timeoutMs: 120_000 }), stats: client.stats });
