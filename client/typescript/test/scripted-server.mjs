// A policy service over a real socket that does what a test scripts; weights count how often an example was scored.
import grpc from "@grpc/grpc-js";
import protobuf from "protobufjs";

const PROTOS = new URL("../dist/proto/", import.meta.url);
const root = new protobuf.Root();
root.resolvePath = (_, target) =>
  target.startsWith("google/protobuf/") ? target : new URL(target, PROTOS).pathname;
root.loadSync(["equipoise/v1/policy.proto", "google/rpc/error_details.proto"]);

const service = Object.fromEntries(
  root.lookupService("equipoise.v1.PolicyService").methodsArray.map((method) => {
    const [request, response] = [method.requestType, method.responseType].map((name) =>
      root.lookupType(`equipoise.v1.${name}`),
    );
    return [
      method.name,
      {
        path: `/equipoise.v1.PolicyService/${method.name}`,
        requestStream: Boolean(method.requestStream),
        responseStream: Boolean(method.responseStream),
        requestSerialize: (message) => Buffer.from(request.encode(request.fromObject(message)).finish()),
        requestDeserialize: (data) => request.toObject(request.decode(data), { longs: Number }),
        responseSerialize: (message) => Buffer.from(response.encode(response.fromObject(message)).finish()),
        responseDeserialize: (data) => response.decode(data),
      },
    ];
  }),
);

/** An error with google.rpc details. */
export function refusal(code, reason, { metadata = {}, retryMs = 0 } = {}) {
  const pack = (name, message) => {
    const type = root.lookupType(`google.rpc.${name}`);
    return { type_url: `type.googleapis.com/google.rpc.${name}`, value: type.encode(type.fromObject(message)).finish() };
  };
  const details = [pack("ErrorInfo", { reason, domain: "equipoise", metadata })];
  if (retryMs) details.push(pack("RetryInfo", { retryDelay: { seconds: 0, nanos: retryMs * 1e6 } }));
  return { code, message: reason.toLowerCase(), details };
}

export class ScriptedServer {
  uid = "a".repeat(32);
  epoch = 1;
  /** Sequences that were applied, by trainer. */
  applied = new Map();
  /** Sequences that arrived, in order, and the requests that opened streams, with their metadata. */
  arrived = [];
  openings = [];
  numExamples = 10;
  limits = {};
  durableLag = 0;
  /** Errors that the next openings end with, one after another. */
  refusals = [];
  /** Whether steps are answered (see `release`), and openings are. */
  answers = true;
  opens = true;
  counts = new Map();
  #held = [];
  #calls = new Set();

  static async start({ port = 0, memory = undefined, credentials = grpc.ServerCredentials.createInsecure() } = {}) {
    const server = new ScriptedServer();
    Object.assign(server, memory);
    server.server = new grpc.Server();
    server.server.addService(service, {
      CreatePolicy: (call, done) => done(null, { status: { uid: server.uid }, created: true }),
      GetPolicy: (call, done) => done(null, { status: { uid: server.uid, version: server.version } }),
      Exchange: (call) => server.#exchange(call),
    });
    server.port = await new Promise((resolve, reject) =>
      server.server.bindAsync(`127.0.0.1:${port}`, credentials, (error, bound) => (error ? reject(error) : resolve(bound))),
    );
    server.address = `127.0.0.1:${server.port}`;
    return server;
  }

  get version() {
    return [...this.applied.values()].reduce((sum, sequences) => sum + sequences.length, 0);
  }

  /** What outlives it. */
  get memory() {
    const { uid, epoch, applied, counts, numExamples } = this;
    return { uid, epoch: epoch + 1, applied, counts, numExamples };
  }

  /** Ends every call at once; what was in flight is not answered. */
  kill() {
    this.server.forceShutdown();
  }

  /** Has every open stream hear something. */
  tell(message) {
    for (const call of this.#calls) call.write(message);
  }

  /** Answers what was not answered, and what comes from now on. */
  release() {
    this.answers = true;
    for (const [call, trainer, step] of this.#held.splice(0)) if (this.#calls.has(call)) this.#step(call, trainer, step);
  }

  /** Ends every open stream. */
  end(error) {
    for (const call of this.#calls) this.#fail(call, error);
  }

  #exchange(call) {
    let trainer;
    call.on("error", () => undefined);
    call.on("close", () => this.#calls.delete(call));
    call.on("cancelled", () => this.#calls.delete(call));
    call.on("end", () => call.end());
    call.on("data", ({ open, step }) => {
      if (step) {
        this.arrived.push(step.sequence);
        return this.#step(call, trainer, step);
      }
      const error = this.refusals.shift();
      if (error) return this.#fail(call, error);
      if (!this.opens) return;
      this.openings.push({ ...open, metadata: call.metadata.getMap() });
      trainer = open.trainerId;
      if (!this.applied.has(trainer)) this.applied.set(trainer, []);
      this.#calls.add(call);
      const { uid, epoch, version, numExamples } = this;
      const last = this.applied.get(trainer).length;
      call.write({
        opened: {
          ...{ uid, epoch, version, numExamples, lastSequence: last },
          durableSequence: Math.max(0, last - this.durableLag),
          ...this.limits,
        },
      });
    });
  }

  #step(call, trainer, step) {
    if (!this.answers) return void this.#held.push([call, trainer, step]);
    const ids = step.exampleIds ? [...new BigUint64Array(new Uint8Array(step.exampleIds).buffer)].map(Number) : [];
    const applied = this.applied.get(trainer);
    let outcome = "OUTCOME_READ";
    if (step.sequence > applied.length + 1) return this.#fail(call, refusal(grpc.status.OUT_OF_RANGE, "SEQUENCE_GAP"));
    if (step.sequence === applied.length + 1) {
      applied.push(step.sequence);
      outcome = step.step === 666 ? "OUTCOME_REFUSED" : "OUTCOME_APPLIED";
      if (step.step !== 666) for (const id of ids) this.counts.set(id, (this.counts.get(id) ?? 1) + 1);
    } else if (step.sequence) outcome = "OUTCOME_DUPLICATE";
    const refused = outcome === "OUTCOME_REFUSED";
    const weights = refused ? [] : ids.map((id) => this.counts.get(id) ?? 1);
    call.write({
      step: {
        ...{ sequence: step.sequence, epoch: this.epoch, version: this.version, outcome },
        durableSequence: Math.max(0, applied.length - this.durableLag),
        weights: new Uint8Array(Float32Array.from(weights).buffer),
        ...(refused && { error: refusal(grpc.status.INVALID_ARGUMENT, "NON_FINITE_STATISTIC") }),
      },
    });
  }

  #fail(call, status) {
    const type = root.lookupType("google.rpc.Status");
    const metadata = new grpc.Metadata();
    metadata.set("grpc-status-details-bin", Buffer.from(type.encode(type.fromObject(status)).finish()));
    call.emit("error", { code: status.code, details: status.message, metadata });
    this.#calls.delete(call);
  }
}

export { grpc };
