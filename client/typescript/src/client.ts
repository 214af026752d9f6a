/** The client: one trainer of one policy. */

import type { Client, Metadata, ServiceError } from "@grpc/grpc-js";

import { fromRpc, UnavailableError } from "./errors.js";
import { type Options, resolve } from "./options.js";
import { GetPolicy, type Method, type PolicyStatus, ReadWeights } from "./protocol.js";
import { buildRead, buildStep, float32s, idBytes, type Ids, type Rows, type StepFields } from "./request.js";
import { Route } from "./route.js";
import { Session, type Stats } from "./session.js";
import { Stream } from "./stream.js";
import type { StepResult, Ticket } from "./window.js";

/** How often is asked whether steps are durable, while somebody waits for it, ms. */
const PROBE_MS = 20;
/** A timer that is so late tells that the event loop was blocked, ms. */
const LATE_MS = 20;

/**
 * A trainer's connection to one policy. It reconnects by itself, and sends steps again until they are durable.
 *
 * @example
 * const client = await PolicyClient.open("localhost:50051", { policy: "run-7", numExamples: 50_000 });
 * for await (const { ids, batch } of loader) {
 *   const { contributions, losses } = statistics(model, batch);
 *   const { weights } = await client.step(ids, { contributions, losses });
 *   model.update(batch, weights);
 * }
 * await client.close();
 */
export class PolicyClient {
  readonly #session: Session;
  readonly #stream: Stream;
  readonly #route: Route;

  private constructor(address: string, options: Options) {
    this.#session = new Session(resolve(options));
    this.#route = new Route(address, this.#session.options.security, this.#session.options.log);
    this.#stream = new Stream(this.#session, this.#route);
  }

  /**
   * Creates or joins a policy, and waits until its stream is open. With `whenLost: "continue"` it also resolves after
   * `timeouts.connectMs` without a server, and training begins with uniform weights.
   *
   * @param address `host:port`; several with commas between them, to go on at another when one is lost
   * @throws InvalidRequestError: an option breaks a rule
   * @throws EquipoiseError: what no retry mends: no such policy, another one of that name, access denied
   */
  static async open(address: string, options: Options): Promise<PolicyClient> {
    const client = new PolicyClient(address, options);
    const { continues, timeouts } = client.#session.options;
    const patience = continues ? timeouts.connectMs : timeouts.waitMs;
    const end = performance.now() + patience;
    const session = client.#session;
    while (!session.opened && !session.failure && performance.now() < end) {
      await client.#stream.changed(end - performance.now());
    }
    if (session.failure) throw session.failure;
    if (!session.opened && !continues) {
      client.#stream.close();
      throw new UnavailableError(`${address}: the stream did not open within ${patience} ms`);
    }
    return client;
  }

  /** Id of this trainer: random unless it was given. */
  get trainerId(): string {
    return this.#session.options.trainerId;
  }

  /** A copy of the counters: `fallbacks`, `lost`, `undurable` and so on. */
  get stats(): Stats {
    return this.#session.stats;
  }

  /** All steps of this trainer up to this sequence are in the server's store. */
  get durableSequence(): number {
    return this.#session.durableSequence;
  }

  /**
   * Sends a step's statistics and waits for weights. Steps are applied in the order of the calls, exactly once each.
   *
   * @param ids the example of each of the B rows; may repeat. "all": all examples in order; null: no rows
   * @throws InvalidRequestError: the input breaks a rule; nothing was sent
   * @throws StepRefusedError: the server refused the step; it changed nothing
   * @throws EquipoiseError: with `whenLost: "wait"`, no answer before the deadline, or state lost; always, what no
   *   retry mends: access denied, trainer replaced
   */
  async step(ids: Rows, fields: StepFields): Promise<StepResult> {
    const ticket = this.#session.step(buildStep(ids, fields, this.#session.bounds), true);
    this.#stream.pump();
    return this.#answer(ticket);
  }

  /**
   * Sends a step's statistics and never waits; `weights` gives what is answered. The event loop has to turn now and then
   * for anything to be sent. A refusal of an earlier step is thrown here.
   *
   * @returns whether the step was taken; false: the window is full, and its statistics were dropped (see `flush`)
   */
  submit(ids: Rows, fields: StepFields): boolean {
    const ticket = this.#session.step(buildStep(ids, fields, this.#session.bounds), false);
    this.#stream.pump();
    return ticket.sequence > 0;
  }

  /** Per id [B] the newest weight that an answer held, 1 where none did; asks nobody. All 1 beyond `maxStaleness`. */
  weights(ids: Ids): Float32Array {
    return this.#session.known(idBytes("ids", ids, this.#session.bounds)[1]).weights;
  }

  /**
   * Reads the weights of ids [B] or "all" (N at most the server's rows of a step), as of all steps made before. With
   * `step`, for rule `trajectory`: those of this row. Throws as `step` does.
   */
  async read(ids: Rows, { step }: { step?: number | bigint } = {}): Promise<StepResult> {
    const ticket = this.#session.read(buildRead(ids, this.#session.bounds, step));
    this.#stream.pump();
    return this.#answer(ticket);
  }

  /** Waits until every step that was taken (not `dropped`) is in the server's store; whether that is so now. */
  async flush({ timeoutMs = this.#patience }: { timeoutMs?: number } = {}): Promise<boolean> {
    const end = performance.now() + timeoutMs;
    while (!this.#session.isDurable && performance.now() < end) await this.#probe();
    this.#session.raiseUntold();
    return this.#session.isDurable;
  }

  /**
   * Reads served weights, or the rule's scores (NaN where never scored), with a call of its own; of rule `strata` also
   * the smoothed losses and the strata.
   *
   * @param field what to read
   * @param ids of which examples; default: all, in order
   * @param rows for rule `trajectory`: the rows [first, first + count) to read, one after another
   */
  async readWeights(
    field: "weight" | "score" | "loss" | "stratum" = "weight",
    { ids, rows }: { ids?: Ids; rows?: { first: number; count: number } } = {},
  ): Promise<Float32Array> {
    const request = {
      policy: this.#session.options.policy,
      field: `FIELD_${field.toUpperCase()}`,
      ...(ids && { exampleIds: idBytes("ids", ids, this.#session.bounds)[0] }),
      ...(rows && { firstRow: rows.first, numRows: rows.count }),
    };
    return await this.#call(ReadWeights, request, (chunks) => {
      const last = chunks.at(-1);
      const values = new Float32Array(last ? last.offset + last.values.length / 4 : 0);
      for (const { offset, values: bytes } of chunks) values.set(float32s(bytes), offset);
      return values;
    });
  }

  /** The policy as it stands. */
  async status(): Promise<PolicyStatus> {
    return await this.#call(GetPolicy, { policy: this.#session.options.policy }, (answers) => answers[0]!.status);
  }

  /**
   * Waits until every step is durable, at most `timeouts.closeMs` or `timeoutMs`, and disconnects.
   *
   * @returns whether every step that was taken is durable; false: `stats.undurable` of them may be lost
   * @throws StepRefusedError: the server refused a submitted step; the client is closed nevertheless
   */
  async close({ timeoutMs = this.#session.options.timeouts.closeMs }: { timeoutMs?: number } = {}): Promise<boolean> {
    if (this.#session.failure) return this.#session.isDurable;
    try {
      return await this.flush({ timeoutMs });
    } finally {
      this.#stream.close();
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  get #patience(): number {
    const { continues, timeouts } = this.#session.options;
    return continues ? timeouts.stepMs : timeouts.waitMs;
  }

  async #answer(ticket: Ticket): Promise<StepResult> {
    const stopWaiting = this.#expireLater(ticket);
    try {
      while (this.#session.isWaiting(ticket)) await this.#probe();
      const result = await ticket.result;
      // A loop of steps without a server must let the event loop turn, or it never hears of the server again.
      if (result.source !== "served") await new Promise(setImmediate);
      return result;
    } finally {
      stopWaiting();
    }
  }

  /** Ends a wait once its time is over, unless the function that is returned is called before. */
  #expireLater(ticket: Ticket): () => void {
    let timer: NodeJS.Timeout;
    const wait = () => {
      const due = performance.now() + this.#patience;
      timer = setTimeout(() => {
        // Nothing was sent or heard while a computation blocked the event loop, which shows in a late timer: wait anew.
        if (performance.now() > due + LATE_MS) wait();
        else this.#session.expire(ticket);
      }, this.#patience);
    };
    wait();
    return () => clearTimeout(timer);
  }

  /** Has the server say how far the steps are durable, and waits for news a little. */
  async #probe(): Promise<void> {
    this.#session.probe();
    this.#stream.pump();
    await this.#stream.changed(PROBE_MS);
  }

  /** Makes a call, to the owner or another server where one is lost, until it succeeds or its deadline is over. */
  async #call<Request, Response, Result>(
    method: Method<Request, Response>,
    request: Request,
    gather: (answers: Response[]) => Result,
  ): Promise<Result> {
    const deadline = Date.now() + this.#session.options.timeouts.callMs;
    for (let attempt = 0; ; attempt++) {
      const { address } = this.#route;
      const [client, metadata] = this.#route.connect(this.#session.options.policy);
      try {
        return gather(await answersOf(client, method, request, metadata, deadline));
      } catch (failure) {
        const error = fromRpc(failure as ServiceError, address);
        const waitMs = Math.max(error.retryAfterMs, Math.min(1000, 50 * 2 ** attempt));
        const isLost = error.reason === "NOT_OWNER" || error instanceof UnavailableError;
        if (isLost) this.#route.turn(error, { address, answered: false });
        if (!isLost || Date.now() + waitMs > deadline) throw error;
        await new Promise((resolve) => setTimeout(resolve, waitMs));
      } finally {
        client.close();
      }
    }
  }
}

/** All answers of a call, of which there is one unless the server streams. */
function answersOf<Request, Response>(
  client: Client,
  { path, serialize, deserialize }: Method<Request, Response>,
  request: Request,
  metadata: Metadata,
  deadline: number,
): Promise<Response[]> {
  return new Promise((resolve, reject) => {
    const call = client.makeServerStreamRequest(path, serialize, deserialize, request, metadata, { deadline });
    const answers: Response[] = [];
    call.on("data", (answer: Response) => answers.push(answer));
    call.on("error", reject);
    call.on("end", () => resolve(answers));
  });
}
