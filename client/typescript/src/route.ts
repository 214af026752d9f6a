/** Which of a service's servers is asked: the next one when one is lost, the owner where another is named. */

import { Client, Metadata } from "@grpc/grpc-js";

import { type EquipoiseError, invalid } from "./errors.js";
import { authorization, channelCredentials, checkSecurity, type Security } from "./security.js";
import { MAX_MESSAGE_BYTES } from "./session.js";

const CHANNEL_OPTIONS = {
  "grpc.max_receive_message_length": MAX_MESSAGE_BYTES,
  "grpc.max_send_message_length": MAX_MESSAGE_BYTES,
  // A peer that is paused or cut off is noticed within 15 s. The server allows a ping every 5 s.
  "grpc.keepalive_time_ms": 8000,
  "grpc.keepalive_timeout_ms": 5000,
  "grpc.keepalive_permit_without_calls": 1,
  // Waits between attempts are the session's, and each attempt has a connection of its own.
  "grpc.use_local_subchannel_pool": 1,
  "grpc.enable_retries": 0,
};

/** How long an owner's address is not tried again that could not be reached, ms; twice as long each time. */
const FIRST_ABSENCE_MS = 1000;
const LONGEST_ABSENCE_MS = 60_000;
/** Addresses that are remembered as unreachable; of more, the oldest are forgotten. */
const MAX_ABSENCES = 256;

/** What is known of the server that was asked. */
interface Asked {
  address: string;
  /** Whether it had said anything before the error. */
  answered: boolean;
}

/**
 * An owner whose address cannot be reached is not followed for a while: what was listed is asked again, as it may be a
 * name of many servers, or know a new owner.
 */
export class Route {
  readonly #listed: string[];
  #position = 0;
  #owner: string | undefined;
  readonly #absent = new Map<string, { failures: number; until: number }>();

  /**
   * @param addresses `host:port`, or several with commas between them
   * @param log told once of each owner's address that cannot be reached
   */
  constructor(
    addresses: string,
    readonly security: Security,
    readonly log: (message: string) => void,
  ) {
    this.#listed = addresses.split(",").map((address) => address.trim());
    if (!this.#listed.every(Boolean)) throw invalid("address", addresses, "must be host:port[,host:port]...");
    for (const address of this.#listed) checkSecurity(security, address);
  }

  /** The server to ask now. */
  get address(): string {
    return this.#owner ?? this.#listed[this.#position]!;
  }

  /** A new connection to it, and the metadata of calls over it. Raises EquipoiseError: a file cannot be read. */
  connect(policy: string): [Client, Metadata] {
    const metadata = new Metadata();
    metadata.set("x-equipoise-policy", policy);
    const place = this.#owner !== undefined ? "here" : this.#absent.size ? "stay" : "";
    if (place) metadata.set("x-equipoise-placement", place);
    const token = authorization(this.security);
    if (token) metadata.set("authorization", token);
    return [new Client(this.address, channelCredentials(this.security), CHANNEL_OPTIONS), metadata];
  }

  /** Chooses the server to ask after an error, or when this one asked to leave; whether the owner was named. */
  turn(error: EquipoiseError | undefined, asked: Asked): boolean {
    if (asked.address === this.#owner) this.#note(asked, error);
    if (asked.address !== this.address) return this.#owner !== undefined; // another call has turned already
    const named = error?.metadata["owner"];
    if (error?.reason === "NOT_OWNER" && named && this.#isUsable(named) && !this.#isAbsent(named)) {
      this.#owner = named;
      return true;
    }
    if (this.#owner === undefined) this.#position = (this.#position + 1) % this.#listed.length;
    this.#owner = undefined;
    return false;
  }

  #isAbsent(address: string): boolean {
    return performance.now() < (this.#absent.get(address)?.until ?? 0);
  }

  /** Remembers whether an owner could be reached; a server's own errors carry a reason. */
  #note({ address, answered }: Asked, error: EquipoiseError | undefined): void {
    if (answered || !error || error.reason) return void this.#absent.delete(address);
    const absence = this.#absent.get(address) ?? { failures: 0, until: 0 };
    if (!absence.failures) {
      const again = this.#listed[this.#position];
      this.log(
        `equipoise: the policy's owner is said to be at ${address}, which cannot be reached (${error.message}): asking ` +
          `${again} again; its setting \`advertise\` must be an address that trainers can use`,
      );
    }
    absence.until = performance.now() + Math.min(LONGEST_ABSENCE_MS, FIRST_ABSENCE_MS * 2 ** absence.failures++);
    this.#absent.set(address, absence);
    if (this.#absent.size > MAX_ABSENCES) this.#absent.delete(this.#absent.keys().next().value!);
  }

  #isUsable(address: string): boolean {
    try {
      checkSecurity(this.security, address); // the token must not travel to it unencrypted
      return true;
    } catch {
      return false;
    }
  }
}
