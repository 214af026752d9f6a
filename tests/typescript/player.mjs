// Plays scripts of steps through the TypeScript client, one policy after another; prints one JSON object for each.
//
//     node player.mjs CLIENT SCRIPT.json
//
// CLIENT: the folder of the built package. A script: {"address", "cases": [{"options", "steps", "rows"}]}; a step is
// {"ids", "half", "read", "fields"}, arrays as numbers with null for NaN; half: sketches are bits of float16 values;
// read: it is one, and `fields` its options; rows: how many rows of a trajectory to read at the end.
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [folder, path] = process.argv.slice(2);
const { PolicyClient, StepRefusedError } = await import(pathToFileURL(`${folder}/dist/index.js`).href);
const { address, cases } = JSON.parse(readFileSync(path, "utf8"));
const WHOLE = ["scored", "measured", "groups", "successes", "attempts", "targetGroups"];
const base64 = (weights) => Buffer.from(weights.buffer).toString("base64");

async function answered(client, { ids, half = false, read = false, fields = {} }) {
  for (const [name, values] of Object.entries(fields)) {
    if (!Array.isArray(values) || name === "weightsFor") continue;
    const kind = half && /[Ss]ketch/.test(name) ? Uint16Array : Float32Array;
    fields[name] = WHOLE.includes(name) ? values : kind.from(values, (value) => value ?? NaN);
  }
  try {
    const result = await (read ? client.read(ids, fields) : client.step(ids, fields));
    return { ...result, weights: base64(result.weights) };
  } catch (error) {
    if (!(error instanceof StepRefusedError)) throw error;
    return { outcome: "refused", reason: error.reason, sequence: error.sequence };
  }
}

async function play({ options, steps, rows }) {
  for (const [name, key] of Object.entries(options.security ?? {})) if (key === null) delete options.security[name];
  const client = await PolicyClient.open(address, { whenLost: "wait", ...options });
  const answers = [];
  for (const step of steps) answers.push(await answered(client, step));
  const final = {
    weights: base64(await client.readWeights()),
    scores: base64(await client.readWeights("score")),
    ...(rows && { rows: base64(await client.readWeights("weight", { rows: { first: 0, count: rows } })) }),
  };
  return { answers, final, durable: await client.close(), stats: client.stats };
}

for (const each of cases) {
  const tell = ({ name, code, reason, message }) => ({ error: { name, code, reason, message } });
  console.log(JSON.stringify(await play(each).catch(tell)));
}
process.exit(0); // a client whose case failed is still open
