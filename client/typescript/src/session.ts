/**
 * One trainer's conversation with one policy, without I/O: numbers steps, keeps those that are not durable, decides what
 * the next stream is sent again, and gives every caller weights or an error.
 */

import { randomUUID } from "node:crypto";

import { EquipoiseError, fromRefusal, invalid, isFinal, StateLostError, UnavailableError } from "./errors.js";
import type { Resolved } from "./options.js";
import type { ExchangeRequest, ExchangeResponse, OpenResponse, StepResponse } from "./protocol.js";
import { type Bounds, buildRead, float32s, oversize, type Request } from "./request.js";
import { WeightsCache } from "./weights.js";
import { type Outcome, type StepResult, Ticket, Window } from "./window.js";

/** Largest message that the client takes or sends, bytes. */
export const MAX_MESSAGE_BYTES = 16 << 20;

/** A message at which so many streams ended one after another is not taken by something on the way: a proxy's limit. */
const SUSPECT_STREAMS = 5;
const SUSPECT_BYTES = 64 << 10; // no proxy's limit is below it

/** Counts since the client was made. */
export class Stats {
  /** Steps made, by `step` and `submit`. */
  steps = 0;
  /** Steps answered as applied; and as applied before. */
  applied = 0;
  duplicates = 0;
  /** Steps and reads that the server refused. */
  refused = 0;
  /** Steps and reads answered without the server, from older weights or uniformly. */
  fallbacks = 0;
  /** Steps whose statistics were dropped because the window was full. */
  dropped = 0;
  /** Answered steps let go before they were durable because the window was full (`whenLost: "continue"` alone). */
  forgotten = 0;
  /** Streams opened after the first. */
  reconnects = 0;
  /** Times the server was lost or did not answer in time. */
  outages = 0;
  /** Steps the server had acknowledged and has lost. */
  lost = 0;
  /** Times the policy's (epoch, version) went back. */
  regressions = 0;
  /** Steps that are kept for replay now, and how many of them wait for their answer. */
  undurable = 0;
  unanswered = 0;
}

type Link = "down" | "opening" | "open" | "leaving";

export class Session {
  readonly bounds: Bounds;
  /** What ended the session for good. */
  failure: EquipoiseError | undefined;
  /** How many streams the server has opened. */
  opened = 0;
  /** Whether the server is known to be lost, or silent, now. */
  outage = false;
  /** Whether the policy is to be created before the next opening. */
  creates: boolean;
  durableSequence = 0;

  readonly #stats = new Stats();
  #link: Link = "down";
  #leaveWithinMs = 0;
  #attempts = 0;
  #openings = 0;
  readonly #clientId = randomUUID();
  #uid = "";
  #seen: [epoch: number, version: number] = [0, 0];
  #made = 0;
  #madeWhenServed = 0;
  #untold: EquipoiseError | undefined;
  #suspect: { ticket: Ticket; streams: number } | undefined;
  #largestAnswered = SUSPECT_BYTES;
  readonly #window: Window;
  readonly #cache: WeightsCache;
  #waiting: Ticket[] = []; // steps for which the window has no room yet
  #reads: Ticket[] = []; // reads that wait for a stream
  #outbox: Ticket[] = [];
  #inFlight: Ticket[] = [];

  constructor(readonly options: Resolved) {
    this.bounds = { numExamples: options.numExamples ?? 0, maxBatchExamples: 0, maxMessageBytes: MAX_MESSAGE_BYTES };
    this.creates = this.bounds.numExamples > 0;
    this.#window = new Window(options.limits);
    this.#cache = new WeightsCache(options.limits.cachedExamples);
    this.#cache.resize(this.bounds.numExamples);
  }

  // What callers ask for.

  /** A copy of the counters. */
  get stats(): Stats {
    const { steps } = this.#window;
    return { ...this.#stats, undurable: steps.length, unanswered: steps.filter((step) => !step.answered).length };
  }

  /** Makes a step; one that has no sequence afterwards was dropped, or waits for room if its caller `waits`. */
  step(request: Request, waits: boolean): Ticket {
    this.raiseUntold();
    this.#made++;
    this.#stats.steps++;
    const ticket = new Ticket(request, this.#made, waits);
    this.#waiting.push(ticket);
    this.#admit();
    const goesOn = this.outage && this.options.continues;
    if (this.isWaiting(ticket) && (goesOn || !waits)) this.#drop(ticket);
    else if (goesOn) this.#fallBack(ticket, "pending");
    return ticket;
  }

  /** Makes a read. */
  read(request: Request): Ticket {
    this.raiseUntold();
    const ticket = new Ticket(request, this.#made, true);
    if (this.outage && this.options.continues) this.#fallBack(ticket, "dropped");
    else (this.#link === "open" ? this.#outbox : this.#reads).push(ticket);
    return ticket;
  }

  /** Asks how far the steps are durable, unless an answer that will tell is under way already. */
  probe(): void {
    const silent = this.#link === "open" && !this.#inFlight.length && !this.#outbox.length;
    if (silent && this.#window.steps.length) this.#outbox.push(new Ticket(buildRead([0], this.bounds, 0), 0, false));
  }

  /** Whether a caller waits for room. */
  isWaiting(ticket: Ticket): boolean {
    return this.#waiting.includes(ticket);
  }

  /** Whether every step is answered and durable. */
  get isDurable(): boolean {
    return !this.#window.steps.length && !this.#waiting.length;
  }

  /** Per id the newest weight served, 1 where unknown; all 1 where that is too old. */
  known(ids: Float64Array): Pick<StepResult, "weights" | "source"> {
    const { weights, known } = this.#cache.lookup(ids);
    const fresh = this.#made - this.#madeWhenServed <= this.options.maxStaleness;
    return known && fresh ? { weights, source: "stale" } : { weights: weights.fill(1), source: "uniform" };
  }

  /** The caller of a step or read has waited long enough. */
  expire(ticket: Ticket): void {
    if (ticket.settled) return;
    const kept = !this.isWaiting(ticket);
    if (kept) this.#beginOutage("no answer in time");
    if (this.options.continues) return void (kept ? this.#fallBack(ticket, "pending") : this.#drop(ticket));
    this.#waiting = this.#waiting.filter((other) => other !== ticket);
    const effect = kept ? "it may still be applied" : "there was no room for it";
    ticket.settle(new UnavailableError(`${this.options.policy}: no answer in time; ${effect}`));
  }

  /** Raises what ended the session, or once what was refused of steps that nobody waited for. */
  raiseUntold(): void {
    if (this.failure) throw this.failure;
    const untold = this.#untold;
    this.#untold = undefined;
    if (untold) throw untold;
  }

  // What a transport asks and tells.

  /** A stream is about to be opened: its first message. */
  begin(): ExchangeRequest {
    this.#link = "opening";
    const { policy, trainerId } = this.options;
    const open = { policy, trainerId, uid: this.#uid, clientId: this.#clientId, attempt: ++this.#openings };
    return { open };
  }

  /** What to send now; undefined: nothing. */
  nextMessage(): ExchangeRequest | undefined {
    if (this.#link !== "open" || this.#inFlight.length >= this.options.limits.inFlight) return undefined;
    const ticket = this.#outbox.shift();
    if (ticket) this.#inFlight.push(ticket);
    return ticket && { step: ticket.request.message };
  }

  /** Whether the stream has nothing more to give: the transport ends it. */
  get left(): boolean {
    return this.#link === "leaving" && !this.#inFlight.length;
  }

  /** Whether the server has opened the stream of now. */
  get isOpen(): boolean {
    return this.#link === "open" || this.#link === "leaving";
  }

  get isOpening(): boolean {
    return this.#link === "opening";
  }

  /** A message arrived. Raises EquipoiseError when it cannot be: the transport ends the stream with it. */
  received(message: ExchangeResponse): void {
    if (message.opened) this.#open(message.opened);
    else if (message.step) this.#answer(message.step);
    else if (message.reconnect) {
      this.#link = "leaving";
      this.#leaveWithinMs = message.reconnect.withinMs;
    }
    if (this.outage && !this.failure) {
      this.outage = false;
      this.#log("the server answers again");
    }
  }

  /**
   * The stream ended, or could not be opened; undefined: it was `left`. That, and to be `sentOn` to the policy's owner,
   * is no outage. How long to wait before the next, ms.
   */
  ended(error: EquipoiseError | undefined, { sentOn }: { sentOn: boolean }): number {
    this.#noteSuspect();
    const reads = [...this.#inFlight, ...this.#outbox, ...this.#reads].filter(({ request }) => request.reads);
    this.#reads = reads.filter((ticket) => !ticket.settled);
    this.#inFlight = [];
    this.#outbox = [];
    this.#link = "down";
    if (!error) return Math.random() * this.#leaveWithinMs;
    if (sentOn) return 0;
    const mayBeMended = this.options.continues && (this.opened > 0 || error.reason === "UID_MISMATCH");
    if (isFinal(error, { mayBeMended })) this.fail(error);
    if (this.failure) return 0;
    if (["POLICY_NOT_FOUND", "UID_MISMATCH"].includes(error.reason)) {
      // The server's store has lost the policy, or someone made another: go on with a new one.
      this.creates = this.options.numExamples !== undefined;
      this.#become("");
    }
    this.#beginOutage(error.message);
    const { firstMs, longestMs } = this.options.backoff;
    const backoff = Math.random() * Math.min(longestMs, firstMs * 2 ** this.#attempts++);
    return Math.max(backoff, error.retryAfterMs);
  }

  /** Ends the session for good: everyone who waits gets the error, and so does every later call. */
  fail(error: EquipoiseError): void {
    this.failure ??= error;
    this.#link = "down";
    for (const ticket of this.#everyone()) ticket.settle(this.failure);
    this.#waiting = [];
  }

  // Openings.

  #open(message: OpenResponse): void {
    if (this.#link !== "opening") throw new EquipoiseError("the server opened a stream twice");
    this.bounds.numExamples = message.numExamples;
    this.bounds.maxBatchExamples = message.maxBatchExamples;
    this.bounds.maxMessageBytes = Math.min(message.maxMessageBytes || MAX_MESSAGE_BYTES, MAX_MESSAGE_BYTES);
    this.#cache.resize(message.numExamples);
    this.#reconcile(message);
    if (this.failure) return;
    if (this.opened++) this.#stats.reconnects++;
    this.#link = "open";
    this.creates = false;
    this.durableSequence = message.durableSequence;
    this.#window.release(message.durableSequence);
    this.#refuseOversized(message.lastSequence);
    // What was applied but not answered is sent too: a duplicate has no effect, and its answer has the weights.
    this.#outbox = this.#window.steps.filter((step) => !step.answered || step.sequence > message.lastSequence);
    this.#outbox.push(...this.#reads);
    this.#reads = [];
    this.#admit();
  }

  /** Numbers the window so that it follows what the server holds. */
  #reconcile({ uid, epoch, version, lastSequence: last }: OpenResponse): void {
    const window = this.#window;
    if (this.#uid !== uid) {
      if (this.opened) this.#lose(this.durableSequence, "is another incarnation of the policy now");
      this.#become(uid);
      window.renumber(last);
    } else if (last > window.lastSequence) {
      this.#lose(0, `is ${last - window.lastSequence} steps ahead of this trainer: another one used its id`);
      while (window.steps.length) this.#fallBack(window.shift(), "dropped");
      window.renumber(last);
    } else if (last + 1 < window.firstSequence) {
      const missing = window.firstSequence - 1 - last;
      this.#lose(missing, `has lost ${missing} steps that it had acknowledged`);
      window.renumber(last);
    }
    this.#observe(epoch, version);
  }

  #become(uid: string): void {
    this.#uid = uid;
    this.#seen = [0, 0];
    this.#cache.clear();
  }

  /** Gives up what the server, or something on the way to it, never takes: else it would be sent for ever. */
  #refuseOversized(lastSequence: number): void {
    const steps = this.#window.steps.filter((step) => step.sequence > lastSequence);
    for (const ticket of [...steps, ...this.#reads]) {
      const rule = `${SUSPECT_STREAMS} streams ended at it: a proxy's limit seems to be below this size`;
      const suspected = this.#suspect?.ticket === ticket && this.#suspect.streams >= SUSPECT_STREAMS;
      const error =
        oversize(ticket.request, this.bounds) ??
        (suspected ? invalid("ids", `a message of ${ticket.request.bytes} bytes`, rule) : undefined);
      if (!error) continue;
      if (ticket.request.reads) this.#reads = this.#reads.filter((read) => read !== ticket);
      else this.#window.remove(ticket);
      this.#refuse(ticket, error);
    }
  }

  /** The stream is ending: was it the oldest message without an answer, once more? */
  #noteSuspect(): void {
    const ticket = this.#inFlight[0];
    if (!ticket) return;
    if (this.#suspect?.ticket !== ticket) this.#suspect = { ticket, streams: 0 };
    if (ticket.request.bytes > this.#largestAnswered) this.#suspect.streams++;
  }

  // Answers.

  #answer(answer: StepResponse): void {
    const ticket = this.#inFlight[0];
    const ids = ticket?.request.answerIds;
    const refused = answer.outcome === "OUTCOME_REFUSED";
    const weights = float32s(answer.weights);
    if (!ticket || ticket.sequence !== answer.sequence || (!refused && weights.length !== ids!.length)) {
      throw new EquipoiseError(
        `the server answered sequence ${answer.sequence} with ${weights.length} weights; expected ${ticket?.sequence}`,
      );
    }
    this.#observe(answer.epoch, answer.version);
    if (this.failure) return;
    this.#inFlight.shift();
    this.#largestAnswered = Math.max(this.#largestAnswered, ticket.request.bytes);
    this.#attempts = 0;
    const news = !ticket.answered;
    ticket.answered = true;
    if (refused) {
      // A refused step that is sent again is refused again: its caller knows.
      if (news) this.#refuse(ticket, fromRefusal(answer.error, answer.sequence));
    } else {
      const outcome = answer.outcome.slice("OUTCOME_".length).toLowerCase() as Outcome;
      if (news && outcome === "applied") this.#stats.applied++;
      if (news && outcome === "duplicate") this.#stats.duplicates++;
      if (!ticket.request.ofRow) {
        this.#cache.store(ids!, weights);
        this.#madeWhenServed = Math.max(this.#madeWhenServed, ticket.made);
      }
      const { sequence, epoch, version, durableSequence } = answer;
      const served = { source: "served", staleness: 0 } as const;
      ticket.settle({ weights, ...served, outcome, sequence, epoch, version, durableSequence });
    }
    this.durableSequence = Math.max(this.durableSequence, answer.durableSequence);
    this.#window.release(this.durableSequence);
    this.#admit();
  }

  /** Holds the server to its promise that (epoch, version) never goes back. */
  #observe(epoch: number, version: number): void {
    const [lastEpoch, lastVersion] = this.#seen;
    this.#seen = [epoch, version];
    if (epoch > lastEpoch || (epoch === lastEpoch && version >= lastVersion)) return;
    this.#stats.regressions++;
    this.#lose(0, `went back from (epoch, version) ${lastEpoch}, ${lastVersion} to ${epoch}, ${version}`);
  }

  // Callers.

  /** Takes waiting steps into the window, as far as there is room. */
  #admit(): void {
    for (let next = this.#waiting[0]; next && this.#makeRoom(next.request); next = this.#waiting[0]) {
      this.#waiting.shift();
      this.#window.add(next);
      if (this.#link === "open") this.#outbox.push(next); // else the next opening finds it in the window
    }
  }

  #makeRoom(request: Request): boolean {
    while (!this.#window.hasRoomFor(request)) {
      // Without a stream nobody knows whether a server lives that has what was answered but is not durable.
      const forgets = this.options.continues && this.#link === "open" && this.#window.steps[0]?.answered;
      if (!forgets) return false;
      this.#window.shift();
      this.#stats.forgotten++;
    }
    return true;
  }

  #drop(ticket: Ticket): void {
    this.#waiting = this.#waiting.filter((other) => other !== ticket);
    if (!this.#stats.dropped++) this.#log("the window is full: the statistics of new steps are dropped");
    this.#fallBack(ticket, "dropped");
  }

  /** Gives a caller the newest weights known. */
  #fallBack(ticket: Ticket, outcome: Outcome): void {
    if (!ticket.awaited) return;
    this.#stats.fallbacks++;
    const { request, sequence } = ticket;
    const [epoch, version] = this.#seen;
    const uniform = { weights: new Float32Array(request.answerIds.length).fill(1), source: "uniform" } as const;
    ticket.settle({
      ...(request.ofRow ? uniform : this.known(request.answerIds)),
      outcome: request.reads ? "dropped" : outcome,
      sequence,
      epoch,
      version,
      durableSequence: this.durableSequence,
      staleness: this.#made - this.#madeWhenServed,
    });
  }

  /** What a caller sent was refused; one who has gone on learns it at the next call. */
  #refuse(ticket: Ticket, error: EquipoiseError): void {
    this.#stats.refused++;
    if (!ticket.awaited) this.#untold ??= error;
    ticket.settle(error);
  }

  #everyone(): Ticket[] {
    return [...this.#window.steps, ...this.#waiting, ...this.#reads, ...this.#outbox, ...this.#inFlight];
  }

  #beginOutage(cause: string): void {
    if (!this.outage) {
      this.outage = true;
      this.#stats.outages++;
      const then = this.options.continues ? "training goes on with the newest weights known" : "waiting for it";
      this.#log(`the server is lost (${cause}); ${then}`);
    }
    if (!this.options.continues) return;
    for (const ticket of this.#everyone()) this.#fallBack(ticket, "pending");
    this.#reads = [];
  }

  /** The server's state does not go together with ours: the end with `wait`, logged with `continue`. */
  #lose(steps: number, text: string): void {
    this.#stats.lost += steps;
    this.#log(text);
    if (!this.options.continues) this.fail(new StateLostError(`${this.options.policy} ${text}`));
  }

  #log(text: string): void {
    this.options.log(`equipoise: ${this.options.policy}: ${text}`);
  }
}
