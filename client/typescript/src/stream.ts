/** Carries one session over one stream after another, each over a connection of its own. */

import type { Client, ClientDuplexStream, Metadata, ServiceError } from "@grpc/grpc-js";

import { EquipoiseError, fromRpc, UnavailableError } from "./errors.js";
import { CreatePolicy, Exchange, type ExchangeRequest, type ExchangeResponse } from "./protocol.js";
import type { Route } from "./route.js";
import type { Session } from "./session.js";

/** Servers that are asked one after another without a wait, each named by the one before. */
const MAX_FOLLOWED = 3;

export class Stream {
  #call: ClientDuplexStream<ExchangeRequest, ExchangeResponse> | undefined;
  readonly #watchers = new Set<() => void>();
  #wake: (() => void) | undefined;
  #followed = 0;

  constructor(readonly session: Session, readonly route: Route) {
    void this.#keepOpen();
  }

  /** Sends what there is to send. */
  pump(): void {
    if (!this.#call) return;
    for (let next = this.session.nextMessage(); next; next = this.session.nextMessage()) this.#call.write(next);
  }

  /** Waits until a message has arrived or the stream has ended, at most so long, ms. */
  async changed(withinMs: number): Promise<void> {
    await new Promise<void>((resolve) => {
      const watcher = () => {
        clearTimeout(timer);
        this.#watchers.delete(watcher);
        resolve();
      };
      const timer = setTimeout(watcher, withinMs);
      this.#watchers.add(watcher);
    });
  }

  /** Ends the stream for good. */
  close(): void {
    this.session.fail(new EquipoiseError("the client was closed"));
    this.#wake?.();
    this.#call?.cancel();
    this.#notify();
  }

  async #keepOpen(): Promise<void> {
    while (!this.session.failure) {
      const { address } = this.route;
      const error = await this.#converse();
      const answered = this.session.isOpen;
      const named = this.route.turn(error, { address, answered });
      this.#followed = named && !answered ? this.#followed + 1 : 0;
      const sentOn = named && error?.reason === "NOT_OWNER" && this.#followed <= MAX_FOLLOWED;
      const waitMs = this.session.ended(error, { sentOn });
      this.#notify();
      if (this.session.failure) return;
      await new Promise<void>((resolve) => {
        const timer = setTimeout(resolve, waitMs);
        this.#wake = () => (clearTimeout(timer), resolve());
      });
    }
  }

  /** Opens a stream and reads it until it ends: why it did; undefined: the server had asked to reconnect. */
  async #converse(): Promise<EquipoiseError | undefined> {
    const { policy, timeouts } = this.session.options;
    const { address } = this.route;
    let client: Client | undefined;
    try {
      const [opened, metadata] = this.route.connect(policy);
      client = opened;
      if (this.session.creates) await this.#create(client, metadata, address);
      if (this.session.failure) return this.session.failure;
      return await this.#exchange(client, metadata, address, timeouts.connectMs);
    } catch (error) {
      return error instanceof EquipoiseError ? error : new EquipoiseError(`${address}: a bug in the client: ${error}`);
    } finally {
      this.#call?.cancel();
      this.#call = undefined;
      client?.close();
    }
  }

  #create(client: Client, metadata: Metadata, address: string): Promise<unknown> {
    const { policy, numExamples, rule = "", settings = {}, durability, referenceNats = 0, timeouts } = this.session.options;
    const spec = {
      name: policy,
      numExamples,
      rule: { name: rule, settings: Object.fromEntries(Object.entries(settings).map(([k, v]) => [k, settingValue(v)])) },
      durability: durability && `DURABILITY_${durability.toUpperCase()}`,
      referenceNats,
    };
    const { path, serialize, deserialize } = CreatePolicy;
    return new Promise((resolve, reject) => {
      const options = { deadline: Date.now() + timeouts.connectMs };
      client.makeUnaryRequest(path, serialize, deserialize, { policy: spec }, metadata, options, (failure, response) =>
        failure ? reject(fromRpc(failure, address)) : resolve(response),
      );
    });
  }

  #exchange(
    client: Client,
    metadata: Metadata,
    address: string,
    connectMs: number,
  ): Promise<EquipoiseError | undefined> {
    const { path, serialize, deserialize } = Exchange;
    const call = client.makeBidiStreamRequest(path, serialize, deserialize, metadata);
    this.#call = call;
    return new Promise((resolve) => {
      // A server that takes the stream and says nothing must not hold it for ever.
      const watchdog = setTimeout(() => {
        if (this.session.isOpening) end(new UnavailableError(`${address}: the stream did not open in ${connectMs} ms`));
      }, connectMs);
      const end = (error: EquipoiseError | undefined) => {
        clearTimeout(watchdog);
        call.removeAllListeners("data");
        resolve(error);
      };
      call.on("data", (message: ExchangeResponse) => {
        try {
          this.session.received(message);
        } catch (error) {
          end(error instanceof EquipoiseError ? error : new EquipoiseError(`a bug in the client: ${error}`));
        }
        this.pump();
        this.#notify();
        if (this.session.left) end(undefined);
        else if (this.session.failure) end(this.session.failure);
      });
      call.on("error", (failure: ServiceError) => end(fromRpc(failure, address)));
      call.on("end", () => end(new UnavailableError(`${address}: the server ended the stream`)));
      call.write(this.session.begin());
    });
  }

  #notify(): void {
    for (const tell of [...this.#watchers]) tell();
  }
}

function settingValue(value: number | boolean | string): object {
  if (typeof value === "number") return { number: value };
  return typeof value === "boolean" ? { flag: value } : { text: value };
}
