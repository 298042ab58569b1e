// Moving the dials of a running answer: one request at a time, and always the latest position.

import { moveDials } from "./api.js";
import { dialsNow } from "./state.js";

const PAUSE = 60; // ms between two moves: a drag is a few dozen events a second

/** Whether two positions are one, but for the server's rounding. */
export function same(one, other) {
  const names = Object.keys({ ...one, ...other });
  return names.every((name) => {
    const [a, b] = [one[name] ?? null, other[name] ?? null];
    return a === null || b === null ? a === b : Math.abs(a - b) < 1e-4;
  });
}

export class LiveDials {
  #id = null;
  #sent = null;
  #timer = 0;
  #busy = false;

  /** failed(error): the server has not moved them. That it has, the chunks of the answer tell. */
  constructor(failed) {
    this.failed = failed;
  }

  /** The answer has an id, and stands at `steering`; the dials may have moved since it was asked for. */
  started(id, steering) {
    this.#id = id;
    this.#sent = steering;
    this.move();
  }

  /** The dials have moved. */
  move() {
    if (this.#id === null || this.#busy || this.#timer) return;
    this.#timer = setTimeout(() => this.#send(), PAUSE);
  }

  over() {
    clearTimeout(this.#timer);
    this.#id = null;
  }

  async #send() {
    this.#timer = 0;
    const wanted = dialsNow();
    if (this.#id === null || same(wanted, this.#sent)) return;
    this.#busy = true;
    this.#sent = wanted;
    try {
      await moveDials(this.#id, wanted);
    } catch (error) {
      if (this.#id !== null && error.status !== 404) this.failed(error); // 404: the answer is over
    } finally {
      this.#busy = false;
    }
    this.move();
  }
}
