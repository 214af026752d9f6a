import assert from "node:assert/strict";
import { once } from "node:events";
import { after, afterEach, beforeEach, describe, it } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { Worker } from "node:worker_threads";

import { InvalidRequestError, PolicyClient, StateLostError, StepRefusedError, UnavailableError } from "../dist/index.js";
import { grpc, refusal, ScriptedServer } from "./scripted-server.mjs";

const PROMPT = { firstMs: 5, longestMs: 20 };
const ONE = { contributions: [1] };

let server;
const clients = [];

beforeEach(async () => (server = await ScriptedServer.start()));
afterEach(async () => {
  for (const client of clients.splice(0)) await client.close({ timeoutMs: 1 }).catch(() => undefined);
  server.kill();
});

async function open(options = {}, address = server.address) {
  const client = await PolicyClient.open(address, {
    ...{ policy: "p", numExamples: 10, backoff: PROMPT, log: () => undefined },
    ...options,
  });
  clients.push(client);
  return client;
}

async function until(condition, what) {
  for (const end = Date.now() + 10_000; !condition(); await sleep(2)) assert(Date.now() < end, `not in time: ${what}`);
}

describe("a step", () => {
  it("is answered with weights", async () => {
    const client = await open();
    const result = await client.step([3, 3, 4n].map(BigInt), { contributions: [1, 2, 3] });
    assert.deepEqual([...result.weights], [3, 3, 2]);
    assert.equal(result.source, "served");
    assert.deepEqual([result.sequence, result.version, result.durableSequence], [1, 1, 1]);
    assert.deepEqual([...client.weights([3, 4, 5])], [3, 2, 1]);
  });

  it("packs ids of every kind alike", async () => {
    const client = await open({ numExamples: undefined });
    server.counts.set(7, 5);
    for (const ids of [[7], [7n], BigUint64Array.of(7n), Uint32Array.of(7), Float64Array.of(7)]) {
      assert.deepEqual([...(await client.read(ids)).weights], [5]);
    }
  });

  it("does not see what the caller changes afterwards", async () => {
    const client = await open();
    const ids = BigUint64Array.of(2n);
    const step = client.step(ids, ONE);
    ids[0] = 5n;
    await step;
    assert.deepEqual([...client.weights([2, 5])], [2, 1]);
  });

  for (const [name, ids, fields] of [
    ["an id that is not below N", [10], ONE],
    ["a negative id", [-1], ONE],
    ["a broken id", [1.5], ONE],
    ["no ids", [], { contributions: [] }],
    ["other lengths", [1, 2], ONE],
    ["NaN", [1], { contributions: [NaN] }],
    ["what float32 cannot hold", [1], { contributions: [1e39] }],
    ["no statistics", [1], {}],
    ["a loss that is not finite", [1], { ...ONE, targetLoss: Infinity }],
    ["scored that is neither 0 nor 1", [1], { ...ONE, scored: [2] }],
    ["measured that is neither 0 nor 1", [1], { ...ONE, measured: [2] }],
    ["measured without contributions", [1], { losses: [1], measured: [1] }],
    ["groups of another length", [1], { ...ONE, groups: [1, 2] }],
    ["a group that is no uint32", [1], { ...ONE, groups: [-1] }],
    ["successes without attempts", [1], { successes: [1] }],
    ["attempts without successes", [1], { attempts: [1] }],
    ["no attempt", [1], { successes: [0], attempts: [0] }],
    ["more successes than attempts", [1], { successes: [3], attempts: [2] }],
    ["a step below zero", [1], { ...ONE, step: -1 }],
    ["sketches without a target", [1], { gradientSketches: [1, 2] }],
  ]) {
    it(`refuses ${name}`, async () => {
      const client = await open();
      await assert.rejects(client.step(ids, fields), InvalidRequestError);
      assert.equal((await client.step([1], ONE)).sequence, 1); // nothing was sent, nothing consumed
    });
  }

  it("ignores NaN in rows that are not scored", async () => {
    const client = await open();
    assert.equal((await client.step([1, 2], { contributions: [1, NaN], scored: [true, false] })).outcome, "applied");
  });

  it("is refused in the stream, which goes on", async () => {
    const client = await open();
    await assert.rejects(client.step([1], { ...ONE, step: 666 }), (error) => {
      assert(error instanceof StepRefusedError);
      assert.deepEqual([error.reason, error.sequence], ["NON_FINITE_STATISTIC", 1]);
      return true;
    });
    assert.equal((await client.step([1], ONE)).sequence, 2);
  });

  it("that was submitted and refused is told at the next call", async () => {
    const client = await open();
    client.submit([1], { ...ONE, step: 666 });
    await assert.rejects(client.flush(), StepRefusedError);
    assert.equal(client.stats.refused, 1);
  });
});

describe("a server that is lost", () => {
  it("never stops training, and gets what was made meanwhile", async () => {
    const client = await open({ timeouts: { stepMs: 50 } });
    await client.step([1], ONE);
    server.kill();
    const without = [];
    // No pause of its own: the loop must not keep the client from noticing.
    for (let made = 0; made < 200; made++) without.push(await client.step([1], ONE));
    assert.equal(without.at(-1).source, "stale");
    assert.equal(without.at(-1).outcome, "pending");
    assert.deepEqual([...without.at(-1).weights], [2]);
    server = await ScriptedServer.start({ port: server.port, memory: server.memory });
    assert(await client.flush({ timeoutMs: 10_000 }));
    assert.equal(server.version, 201);
    assert.equal(client.stats.lost, 0);
  });

  it("is waited for, if asked", async () => {
    const client = await open({ whenLost: "wait" });
    await client.step([1], ONE);
    server.kill();
    const step = client.step([1], ONE);
    server = await ScriptedServer.start({ port: server.port, memory: server.memory });
    assert.deepEqual([...(await step).weights], [3]);
  });

  it("is an error after the deadline, if waited for", async () => {
    server.answers = false;
    const client = await open({ whenLost: "wait", timeouts: { waitMs: 30 } });
    await assert.rejects(client.step([1], ONE), UnavailableError);
  });

  it("may be lost from the beginning", async () => {
    server.kill();
    const client = await open({ timeouts: { connectMs: 50, stepMs: 20 } });
    const result = await client.step([1, 2], { contributions: [1, 1] });
    assert.deepEqual([result.source, ...result.weights], ["uniform", 1, 1]);
    server = await ScriptedServer.start({ port: server.port });
    assert(await client.flush({ timeoutMs: 10_000 }));
    assert.equal(server.version, 1);
  });

  it("is not lost because this thread was busy", async () => {
    const thread = new Worker(new URL("./answering-thread.mjs", import.meta.url));
    const [address] = await once(thread, "message");
    const client = await open({ timeouts: { stepMs: 500 } }, address);
    await client.step([1], ONE);
    const step = client.step([1], ONE);
    for (const end = Date.now() + 600; Date.now() < end; ); // computes meanwhile
    assert.equal((await step).source, "served");
    await client.close();
    await thread.terminate();
  });

  it("or silent at the opening", async () => {
    server.opens = false;
    const client = await open({ timeouts: { connectMs: 40, stepMs: 20 } });
    assert.equal((await client.step([1], ONE)).source, "uniform");
    server.opens = true;
    assert(await client.flush({ timeoutMs: 10_000 }));
  });

  it("and weights older than maxStaleness are not used", async () => {
    const client = await open({ timeouts: { stepMs: 20 }, maxStaleness: 2 });
    await client.step([1], ONE);
    server.answers = false;
    const sources = [];
    for (let made = 0; made < 4; made++) sources.push((await client.step([1], ONE)).source);
    assert.deepEqual(sources, ["stale", "stale", "uniform", "uniform"]);
  });
});

describe("a new stream", () => {
  it("is sent what is not durable, though it had been answered", async () => {
    server.durableLag = 2;
    const client = await open({ whenLost: "wait" });
    for (let made = 0; made < 5; made++) await client.step([1], ONE);
    server.applied.set(client.trainerId, [1, 2, 3]); // the server was killed before it wrote the last two
    server.durableLag = 0;
    server.arrived = [];
    server.epoch++;
    server.end(refusal(grpc.status.UNAVAILABLE, "DRAINING"));
    assert(await client.flush());
    assert.deepEqual(server.arrived.filter(Boolean), [4, 5]);
    assert.equal(client.stats.lost, 0);
  });

  it("tells what was durable and is lost", async () => {
    const client = await open();
    for (let made = 0; made < 5; made++) await client.step([1], ONE);
    server.applied.set(client.trainerId, [1, 2]);
    server.end(refusal(grpc.status.UNAVAILABLE, "DRAINING"));
    await until(() => client.stats.reconnects === 1, "a new stream");
    assert.equal(client.stats.lost, 3);
    assert.equal((await client.step([1], ONE)).sequence, 3);
  });

  it("that finds something lost is the end of a run that must be reproducible", async () => {
    const client = await open({ whenLost: "wait" });
    for (let made = 0; made < 5; made++) await client.step([1], ONE);
    server.applied.set(client.trainerId, [1, 2]);
    server.end(refusal(grpc.status.UNAVAILABLE, "DRAINING"));
    await assert.rejects(async () => {
      for (;;) await client.step([1], ONE);
    }, StateLostError);
  });

  it("names the incarnation, and goes on with another one", async () => {
    const client = await open();
    await client.step([1], ONE);
    server.uid = "b".repeat(32);
    server.applied.clear();
    server.refusals = [refusal(grpc.status.FAILED_PRECONDITION, "UID_MISMATCH")];
    server.end(refusal(grpc.status.UNAVAILABLE, "DRAINING"));
    await until(() => client.stats.reconnects === 1, "a new stream");
    assert.deepEqual(server.openings.map(({ uid }) => uid ?? ""), ["", ""]); // the refused one is not among them
    assert.equal((await client.step([1], ONE)).sequence, 1);
    assert.equal(client.stats.lost, 1);
  });

  it("is waited for while the policy is loaded", async () => {
    server.refusals = Array.from({ length: 3 }, () => refusal(grpc.status.UNAVAILABLE, "LOADING", { retryMs: 5 }));
    const client = await open({ whenLost: "wait" });
    assert.equal((await client.step([1], ONE)).outcome, "applied");
  });

  it("is opened where the owner is", async () => {
    const other = await ScriptedServer.start();
    const metadata = { owner: other.address };
    server.refusals = Array.from({ length: 9 }, () => refusal(grpc.status.FAILED_PRECONDITION, "NOT_OWNER", { metadata }));
    const client = await open({ whenLost: "wait" });
    await client.step([1], ONE);
    assert.deepEqual([server.version, other.version], [0, 1]);
    await client.close();
    other.kill();
  });

  it("is sent on to the owner without an outage, before the first opening and later", async () => {
    const other = await ScriptedServer.start();
    const sentTo = ({ address }) => refusal(grpc.status.FAILED_PRECONDITION, "NOT_OWNER", { metadata: { owner: address } });
    const told = [];
    server.refusals = [sentTo(other)];
    const client = await open({ log: (message) => told.push(message) }); // its fallbacks would show an outage, too
    assert.equal((await client.step([1], ONE)).source, "served");
    other.refusals = [sentTo(server)];
    server.uid = other.uid;
    server.epoch = 2;
    server.applied.set(client.trainerId, [1]);
    other.end(sentTo(server)); // the policy has moved
    const answer = await client.step([1], ONE);
    assert.deepEqual([answer.source, answer.epoch, answer.sequence], ["served", 2, 2]);
    const { outages, fallbacks, reconnects } = client.stats;
    assert.deepEqual({ outages, fallbacks, reconnects }, { outages: 0, fallbacks: 0, reconnects: 1 });
    assert.deepEqual(told, []);
    await client.close();
    other.kill();
  });

  it("is an outage again where each server names another", async () => {
    const other = await ScriptedServer.start();
    const naming = ({ address }) =>
      Array.from({ length: 100 }, () => refusal(grpc.status.FAILED_PRECONDITION, "NOT_OWNER", { metadata: { owner: address } }));
    [server.refusals, other.refusals] = [naming(other), naming(server)];
    const client = await open({ backoff: { firstMs: 1, longestMs: 60_000 } });
    assert.equal((await client.step([1], ONE)).source, "uniform");
    assert.equal(client.stats.outages, 1);
    await client.close();
    other.kill();
  });

  it("is sent on less and less often by two servers that name each other", async () => {
    const other = await ScriptedServer.start();
    const naming = ({ address }) =>
      Array.from({ length: 5000 }, () => refusal(grpc.status.FAILED_PRECONDITION, "NOT_OWNER", { metadata: { owner: address } }));
    [server.refusals, other.refusals] = [naming(other), naming(server)];
    const client = await open({ backoff: { firstMs: 1, longestMs: 60_000 } });
    client.submit([1], ONE);
    await sleep(1000);
    assert.ok(server.refusals.length + other.refusals.length > 10_000 - 40);
    await client.close();
    other.kill();
  });

  it("is not kept by an owner's address that leads nowhere, of which the log tells once", async () => {
    const gone = await ScriptedServer.start();
    gone.kill();
    const metadata = { owner: gone.address };
    server.refusals = Array.from({ length: 5 }, () => refusal(grpc.status.FAILED_PRECONDITION, "NOT_OWNER", { metadata }));
    const told = [];
    const client = await open({ whenLost: "wait", log: (message) => told.push(message) });
    await client.step([1], ONE);
    assert.equal(server.version, 1);
    const [warning, ...others] = told.filter((message) => message.includes("cannot be reached"));
    assert.match(warning, new RegExp(`${gone.address}.*advertise`));
    assert.deepEqual(others, []);
    assert.equal(await client.status().then((status) => status.version), 1);
  });

  it("is opened at the next address when one is lost", async () => {
    const other = await ScriptedServer.start();
    const client = await open({ whenLost: "wait" }, `${server.address},${other.address}`);
    await client.step([1], ONE);
    other.memory.applied.set(client.trainerId, [1]);
    other.uid = server.uid;
    other.epoch = 2;
    server.kill();
    assert.equal((await client.step([1], ONE)).epoch, 2);
    await client.close();
    other.kill();
  });

  it("is opened after the old one was answered, when the server asks to leave", async () => {
    const client = await open({ whenLost: "wait" });
    server.answers = false;
    const steps = [client.step([1], ONE), client.step([1], ONE)];
    await until(() => server.arrived.length === 2, "steps arrive");
    server.tell({ reconnect: { withinMs: 1 } });
    await sleep(5); // however the message and the step meet
    steps.push(client.step([1], ONE));
    server.release();
    const answers = await Promise.all(steps);
    assert.deepEqual(answers.map(({ sequence }) => sequence), [1, 2, 3]);
    assert(answers.every(({ outcome }) => outcome === "applied"));
    await until(() => server.openings.length === 2, "a new stream");
    assert.equal(client.stats.outages, 0);
  });

  it("comes without a word of an outage, when the server asks to leave and nothing is under way", async () => {
    const client = await open();
    await client.step([1], ONE);
    server.tell({ reconnect: { withinMs: 1 } });
    await until(() => client.stats.reconnects === 1, "a new stream");
    assert.equal(client.stats.outages, 0);
    assert.equal((await client.step([1], ONE)).source, "served");
  });

  for (const [code, reason] of [
    ["ABORTED", "TRAINER_REPLACED"],
    ["INVALID_ARGUMENT", "MALFORMED_REQUEST"],
  ]) {
    it(`is not opened after ${reason}`, async () => {
      const client = await open();
      await client.step([1], ONE);
      server.end(refusal(grpc.status[code], reason));
      await until(() => client.stats.outages === 0 && server.openings.length === 1, "the end");
      await assert.rejects(async () => {
        for (;;) await client.step([1], ONE);
      }, { reason });
    });
  }

  it("that is not allowed is told by open", async () => {
    server.refusals = [refusal(grpc.status.PERMISSION_DENIED, "POLICY_FORBIDDEN")];
    await assert.rejects(open(), { reason: "POLICY_FORBIDDEN" });
  });
});

describe("what is kept", () => {
  it("is bounded: a step waits for room", async () => {
    server.durableLag = 2;
    const client = await open({ whenLost: "wait", limits: { windowSteps: 2, inFlight: 1 } });
    await Promise.all([1, 2].map(() => client.step([1], ONE)));
    const third = client.step([1], ONE);
    assert.equal(client.stats.undurable, 2);
    assert.equal(client.submit([1], ONE), false);
    server.durableLag = 0;
    assert.equal((await third).sequence, 3);
    assert.deepEqual([client.stats.dropped, client.stats.forgotten], [1, 0]);
  });

  it("is bounded: a step that waits for room hears of the end", async () => {
    server.durableLag = 2;
    const client = await open({ whenLost: "wait", limits: { windowSteps: 1 } });
    await client.step([1], ONE);
    const second = client.step([1], ONE);
    server.end(refusal(grpc.status.ABORTED, "TRAINER_REPLACED"));
    await assert.rejects(second, { reason: "TRAINER_REPLACED" });
  });

  it("is bounded: without a server what does not fit is dropped", async () => {
    const client = await open({ timeouts: { stepMs: 20 }, limits: { windowSteps: 3 } });
    server.answers = false;
    const outcomes = [];
    for (let made = 0; made < 5; made++) outcomes.push((await client.step([1], ONE)).outcome);
    assert.deepEqual(outcomes, ["pending", "pending", "pending", "dropped", "dropped"]);
    assert.deepEqual([client.stats.undurable, client.stats.dropped], [3, 2]);
  });

  it("is sent a few at a time", async () => {
    const client = await open({ limits: { inFlight: 2 } });
    server.answers = false;
    for (let made = 0; made < 5; made++) client.submit([1], ONE);
    await until(() => server.arrived.length === 2, "two steps");
    await sleep(10);
    assert.equal(server.arrived.length, 2);
  });

  it("is refused to its caller when it is larger than the server takes", async () => {
    server.limits = { maxBatchExamples: 4, maxMessageBytes: 2000 };
    const client = await open();
    await assert.rejects(client.step([1, 2, 3, 4, 5], { contributions: [1, 2, 3, 4, 5] }), /at most 4 in one step/);
    server.limits = { maxMessageBytes: 300 };
    server.end(refusal(grpc.status.UNAVAILABLE, "DRAINING"));
    await until(() => client.stats.reconnects === 1, "a new stream");
    await assert.rejects(client.step([1, 2, 3, 4, 5], { contributions: [1, 2, 3, 4, 5] }), /at most 300/);
    assert.equal((await client.step([1], ONE)).sequence, 1);
  });

  it("is refused to its caller, also when the limit is known too late", async () => {
    server.kill();
    const client = await open({ timeouts: { connectMs: 20, stepMs: 20 } });
    client.submit([1], ONE);
    client.submit([1, 2, 3], { contributions: [1, 2, 3] });
    client.submit([2], ONE);
    server = await ScriptedServer.start({ port: server.port });
    server.limits = { maxBatchExamples: 2 };
    await assert.rejects(client.flush({ timeoutMs: 10_000 }), /at most 2 in one step/);
    assert.equal(server.version, 2);
  });

  it("is given up when stream after stream ends at it", async () => {
    const client = await open({ numExamples: 1, whenLost: "wait" });
    const rows = 10_000;
    server.answers = false;
    const large = client.step(new Uint32Array(rows), { contributions: new Float32Array(rows) });
    const cutting = setInterval(() => {
      if (server.arrived.splice(0).length) server.end(refusal(grpc.status.UNAVAILABLE, ""));
    }, 2);
    await assert.rejects(large, /a proxy's limit/);
    clearInterval(cutting);
    server.answers = true;
    assert.equal((await client.step([0], ONE)).sequence, 1);
  });
});

describe("closing", () => {
  it("waits until the last steps are durable", async () => {
    server.durableLag = 1;
    const client = await open();
    for (let made = 0; made < 3; made++) client.submit([1], ONE);
    const closed = client.close();
    await until(() => server.version === 3, "all applied");
    server.durableLag = 0;
    assert(await closed);
    assert(server.arrived.includes(0)); // it asked
    await assert.rejects(client.step([1], ONE), /closed/);
  });

  it("says that it did not succeed", async () => {
    server.answers = false;
    const client = await open();
    client.submit([1], ONE);
    assert.equal(await client.close({ timeoutMs: 20 }), false);
    assert.equal(client.stats.undurable, 1);
  });
});

describe("options", () => {
  for (const [name, options] of Object.entries({
    "no policy": { policy: undefined },
    "a name in capitals": { policy: "P" },
    "a policy without examples": { numExamples: 0 },
    "a word for whenLost": { whenLost: "stop" },
    "no room": { limits: { windowSteps: 0 } },
    "a trainer without a name": { trainerId: "" },
    "half of a certificate": { security: { clientKey: "key.pem" } },
  })) {
    it(`refuse ${name}`, async () => {
      await assert.rejects(open(options), InvalidRequestError);
    });
  }
});

describe("a token", () => {
  it("travels with every call", async () => {
    const client = await open({ security: { token: "secret" } });
    await client.step([1], ONE);
    assert.equal(server.openings[0].metadata.authorization, "Bearer secret");
    assert.equal(server.openings[0].metadata["x-equipoise-policy"], "p");
  });

  it("does not travel unencrypted to another machine", async () => {
    await assert.rejects(open({ security: { token: "secret" } }, "example.org:50051"), /unencrypted/);
  });
});
