/** The steps of one trainer that are not durable yet, kept for replay. */

import type { EquipoiseError } from "./errors.js";
import type { Request } from "./request.js";

/** Where weights come from: the server; an earlier answer of it; or nothing recent is known, all 1. */
export type Source = "served" | "stale" | "uniform";
/**
 * What happened to a step: the policy moved; it had been applied before, with weights of now; a read; not answered in
 * time, but kept and sent again; not answered in time and not kept, for there is no room, or it was a read.
 */
export type Outcome = "applied" | "duplicate" | "read" | "pending" | "dropped";

/** Weights, and how they came about. */
export interface StepResult {
  /** One per row (or id of `weightsFor`); mean 1 over all examples of the policy. */
  weights: Float32Array;
  source: Source;
  outcome: Outcome;
  /** The step's number among this trainer's, from 1; 0: a read, or the step was dropped. */
  sequence: number;
  /** Epoch and version of the policy that the weights belong to; of older weights: the newest seen. */
  epoch: number;
  version: number;
  /** All steps of this trainer up to it are in the server's store. */
  durableSequence: number;
  /** How many steps of this client are newer than these weights; 0 for served ones. */
  staleness: number;
}

/** A step or read, from when it is made until it is answered (and, a step, durable). */
export class Ticket {
  answered = false;
  settled = false;
  /** What its caller gets, once. */
  readonly result: Promise<StepResult>;
  #resolve!: (result: StepResult) => void;
  #reject!: (error: EquipoiseError) => void;

  /**
   * @param request what is sent
   * @param made how many steps the client had made, this one included
   * @param waits whether there is a caller who waits
   */
  constructor(readonly request: Request, readonly made: number, readonly waits: boolean) {
    this.result = new Promise((resolve, reject) => {
      this.#resolve = resolve;
      this.#reject = reject;
    });
    this.result.catch(() => undefined); // it may be settled before its caller looks at it
  }

  get sequence(): number {
    return this.request.message.sequence;
  }

  set sequence(sequence: number) {
    this.request.message.sequence = sequence;
  }

  /** Whether a caller still waits. */
  get awaited(): boolean {
    return this.waits && !this.settled;
  }

  settle(outcome: StepResult | EquipoiseError): void {
    if (!this.awaited) return;
    this.settled = true;
    if (outcome instanceof Error) this.#reject(outcome);
    else this.#resolve(outcome);
  }
}

/** Steps in the order of their sequences, without gaps. */
export class Window {
  /** Sequence of the newest step ever added. */
  lastSequence = 0;
  readonly steps: Ticket[] = [];
  #bytes = 0;

  constructor(readonly limits: { windowSteps: number; windowBytes: number }) {}

  /** Sequence of the oldest step kept; that of the next step when none is. */
  get firstSequence(): number {
    return this.lastSequence + 1 - this.steps.length;
  }

  hasRoomFor(request: Request): boolean {
    const { windowSteps, windowBytes } = this.limits;
    return !this.steps.length || (this.steps.length < windowSteps && this.#bytes + request.bytes <= windowBytes);
  }

  /** Appends a step and gives it the next sequence. */
  add(ticket: Ticket): void {
    ticket.sequence = ++this.lastSequence;
    this.steps.push(ticket);
    this.#bytes += ticket.request.bytes;
  }

  /** Lets go of the oldest step. */
  shift(): Ticket {
    const ticket = this.steps.shift()!;
    this.#bytes -= ticket.request.bytes;
    return ticket;
  }

  /** Lets go of the steps that are answered and durable. */
  release(durableSequence: number): void {
    while (this.steps[0]?.answered && this.steps[0].sequence <= durableSequence) this.shift();
  }

  /** Numbers the steps kept anew, from the one after `lastSequence`. */
  renumber(lastSequence: number): void {
    this.lastSequence = lastSequence;
    for (const ticket of this.steps) ticket.sequence = ++this.lastSequence;
  }

  /** Lets go of a step that the server does not have; those behind it move up. */
  remove(ticket: Ticket): void {
    const first = this.firstSequence;
    this.steps.splice(this.steps.indexOf(ticket), 1);
    this.#bytes -= ticket.request.bytes;
    this.renumber(first - 1);
  }
}
