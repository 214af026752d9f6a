/** The newest weight of each example, in bounded memory: what training goes on with when the server is lost. */
export class WeightsCache {
  // One slot per example while they all fit; beyond, examples share slots and a new weight takes an older one's place.
  // Answers arrive in the order of their versions, so the last one is the newest.
  #owners = new Float64Array(0); // id + 1; 0: empty
  #weights = new Float32Array(0);

  constructor(readonly capacity: number) {}

  /** Makes room for a policy of so many examples; keeps what it holds when the size is the same. */
  resize(numExamples: number): void {
    const size = Math.min(numExamples, this.capacity);
    if (size === this.#owners.length) return;
    this.#owners = new Float64Array(size);
    this.#weights = new Float32Array(size);
  }

  clear(): void {
    this.#owners.fill(0);
  }

  /** Remembers weights [B] of ids [B]. */
  store(ids: Float64Array, weights: Float32Array): void {
    const size = this.#owners.length;
    if (!size) return;
    ids.forEach((id, row) => {
      this.#owners[id % size] = id + 1;
      this.#weights[id % size] = weights[row]!;
    });
  }

  /** Weights [B] of ids [B], 1 where unknown; and whether any is known. */
  lookup(ids: Float64Array): { weights: Float32Array; known: boolean } {
    const size = this.#owners.length;
    let known = false;
    const weights = new Float32Array(ids.length).fill(1);
    ids.forEach((id, row) => {
      if (!size || this.#owners[id % size] !== id + 1) return;
      weights[row] = this.#weights[id % size]!;
      known = true;
    });
    return { weights, known };
  }
}
