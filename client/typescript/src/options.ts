/** How a client behaves. */

import { randomUUID } from "node:crypto";

import { invalid } from "./errors.js";
import { type Security, securityFromEnvironment } from "./security.js";

/** Deadlines, ms. */
export interface Timeouts {
  /** Longest wait of a step or read with `whenLost: "continue"`. Default 1000. */
  stepMs: number;
  /** Longest wait of a step or read with `whenLost: "wait"`. Default 300,000. */
  waitMs: number;
  /** Longest wait for a stream to open; also of `open`, with `whenLost: "continue"`. Default 5000. */
  connectMs: number;
  /** Deadline of every other call. Default 10,000. */
  callMs: number;
  /** Longest wait of `close` until every step is durable. Default 10,000. */
  closeMs: number;
}

/** Exponential backoff with full jitter: attempt k waits a uniform random time in [0, min(longest, first·2^k)], ms. */
export interface Backoff {
  /** Default 100. */
  firstMs: number;
  /** Default 2000. */
  longestMs: number;
}

/** How much a client keeps. */
export interface Limits {
  /** Steps kept until they are durable, for replay. Default 4096. */
  windowSteps: number;
  /** Their size together, bytes. Default 64 MiB. */
  windowBytes: number;
  /** Steps and reads sent and not yet answered. Default 64. */
  inFlight: number;
  /** Examples whose newest weight is kept, 12 bytes each. Default 4,194,304. */
  cachedExamples: number;
}

export interface Options {
  /** Name of the policy, `[a-z0-9][a-z0-9._-]{0,127}`. */
  policy: string;
  /** N. When given, the policy is created unless it exists; else it must exist. */
  numExamples?: number;
  /** Name of the rule; default: the server's. */
  rule?: string;
  /** Settings of the rule by name. */
  settings?: Record<string, number | boolean | string>;
  /** `logged` (default): a step is answered once it is in the server's log; `behind`: at once. */
  durability?: "logged" | "behind";
  /** ln|V|, nats: the loss of a uniform guess, for the compression ratio. */
  referenceNats?: number;
  /** Id of this trainer, 1 to 128 printable ASCII characters; default: random. Two live clients must not share one. */
  trainerId?: string;
  /**
   * What a step does when the server is lost: `continue` (default) with the newest weights known; a step is then never
   * rejected for the network. Or `wait` for the server up to a deadline, for runs that must be reproducible.
   */
  whenLost?: "continue" | "wait";
  /** Most steps that weights served before may be older than the newest step, to be used at all. Default 1000. */
  maxStaleness?: number;
  timeouts?: Partial<Timeouts>;
  backoff?: Partial<Backoff>;
  limits?: Partial<Limits>;
  /** TLS and token; default: what the environment says (`EQUIPOISE_TOKEN`, `EQUIPOISE_ROOT_CERTIFICATES`, ...). */
  security?: Security;
  /** Told once of each loss of the server, its return, and what does not go together. Default: `console.warn`. */
  log?: (message: string) => void;
}

/** Options with every default filled in. */
export interface Resolved extends Options {
  trainerId: string;
  continues: boolean;
  maxStaleness: number;
  timeouts: Timeouts;
  backoff: Backoff;
  limits: Limits;
  security: Security;
  log: (message: string) => void;
}

/** Raises InvalidRequestError. */
export function resolve(options: Options): Resolved {
  const { policy, numExamples, whenLost = "continue", trainerId = randomUUID(), maxStaleness = 1000 } = options;
  if (typeof policy !== "string" || !NAME.test(policy)) throw invalid("policy", policy, `must be like ${NAME.source}`);
  if (numExamples !== undefined && !(Number.isSafeInteger(numExamples) && numExamples > 0)) {
    throw invalid("numExamples", numExamples, "must be a positive integer");
  }
  if (!["continue", "wait"].includes(whenLost)) throw invalid("whenLost", whenLost, "must be continue or wait");
  if (!/^[\x20-\x7e]{1,128}$/.test(trainerId)) throw invalid("trainerId", trainerId, "1 to 128 printable ASCII");
  if (!(maxStaleness >= 0)) throw invalid("maxStaleness", maxStaleness, "must not be negative");
  return {
    ...options,
    trainerId,
    maxStaleness,
    continues: whenLost === "continue",
    timeouts: positive("timeouts", {
      ...{ stepMs: 1000, waitMs: 300_000, connectMs: 5000, callMs: 10_000, closeMs: 10_000 },
      ...options.timeouts,
    }),
    backoff: positive("backoff", { firstMs: 100, longestMs: 2000, ...options.backoff }),
    limits: positive("limits", {
      ...{ windowSteps: 4096, windowBytes: 64 << 20, inFlight: 64, cachedExamples: 1 << 22 },
      ...options.limits,
    }),
    security: options.security ?? securityFromEnvironment(),
    log: options.log ?? console.warn,
  };
}

const NAME = /^[a-z0-9][a-z0-9._-]{0,127}$/;

function positive<Values extends object>(group: string, values: Values): Values {
  for (const [name, value] of Object.entries(values)) {
    if (!(value > 0)) throw invalid(`${group}.${name}`, value, "must be positive");
  }
  return values;
}
