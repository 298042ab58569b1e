// Saying an answer: the request, its stream, the dials that move meanwhile, and everything that can go wrong.

import { chat } from "./api.js";
import { notice } from "./dom.js";
import { check } from "./health.js";
import { askKey } from "./key.js";
import { LiveDials, same } from "./live.js";
import { keepReadings } from "./reading.js";
import { dialsNow, dialsOff, samplingNow, save, state, withoutOldest } from "./state.js";

const TRIES = 20; // while the queue is full

const running = new Map(); // answer → {control, live}

export const isRunning = () => running.size > 0;

export const stopAll = () => running.forEach(({ control }) => control.abort());

/** The dials have moved: tell the answers that follow them. */
export const moveLive = () => running.forEach(({ live }) => live.move());

/** A version of a turn: one answer, or with `compare` a steered and an unsteered one, at one seed. */
export function newVersion(compare) {
  const sampling = samplingNow();
  sampling.seed ??= crypto.getRandomValues(new Uint32Array(1))[0] % 1_000_000; // short enough to type
  const answer = (kind) => ({
    kind, text: "", status: "waiting", note: "", problem: "", id: "", finish: "", tokens: 0, seconds: 0, moves: [], sampling, left_out: 0,
    steering: kind === "steered" ? dialsNow() : dialsOff(),
  });
  return (compare ? ["steered", "unsteered"] : ["steered"]).map(answer);
}

/** Have the server say `answer` to `messages`; `changed` is called after every change of it. Never raises. */
export async function say(answer, messages, changed) {
  const control = new AbortController();
  const live = new LiveDials((error) => notice(`The dial did not move: ${error.message}`));
  running.set(answer, { control, live });
  try {
    await withRetries(answer, messages, changed, control.signal, live);
    answer.status = "done";
  } catch (error) {
    answer.status = error.name === "AbortError" ? "stopped" : "failed";
    if (answer.status === "failed") answer.problem = error.message;
    if (answer.status === "failed" && [0, 400].includes(error.status)) check(true); // gone, or another since
  }
  live.over();
  running.delete(answer);
  answer.note = "";
  changed(answer);
  save();
}

async function withRetries(answer, messages, changed, signal, live) {
  for (let tries = 1; ; tries++) {
    try {
      return await stream(answer, messages, changed, signal, live);
    } catch (error) {
      const fewer = error.code === "context_length_exceeded" ? withoutOldest(messages) : null;
      if (fewer) {
        messages = fewer;
        answer.left_out += 1;
      } else if (error.status === 503 && tries < TRIES) await countDown(answer, error, changed, signal);
      else if (error.status !== 401 || !(await askKey())) throw error;
      if (answer.kind === "steered") answer.steering = dialsNow(); // they may have moved while it waited
    }
  }
}

/** Wait as long as the server said, telling how long it will be. */
async function countDown(answer, error, changed, signal) {
  for (let left = Math.ceil(error.retryAfter || 2); left > 0; left--) {
    answer.note = `${error.message.replace(/\.?$/, ".")} Trying again in ${left} s.`;
    changed(answer);
    await new Promise((resolve, reject) => {
      const timer = setTimeout(resolve, 1000);
      signal.addEventListener("abort", () => { clearTimeout(timer); reject(new DOMException("", "AbortError")); }, { once: true });
    });
  }
  answer.note = "";
}

async function stream(answer, messages, changed, signal, live) {
  let started = 0; // with the first word: waiting for a turn is not the model's speed
  const body = { messages, steering: answer.steering, stream_options: { include_usage: true }, ...answer.sampling };
  if (state.read) body.read = true;
  for await (const chunk of chat(body, signal)) {
    if (chunk.id && !answer.id) {
      answer.id = chunk.id;
      if (chunk.steering) answer.steering = chunk.steering; // what the server really applied
      if (answer.kind === "steered") live.started(chunk.id, answer.steering);
    }
    const choice = chunk.choices?.[0];
    const said = choice?.delta?.content ?? "";
    keepReadings(answer, choice?.readings);
    if (said) {
      if (chunk.steering) saidAt(answer, chunk.steering);
      started ||= performance.now();
      answer.text += said;
      answer.status = "talking";
      answer.tokens += 1;
    }
    answer.finish = choice?.finish_reason ?? answer.finish;
    answer.tokens = chunk.usage?.completion_tokens ?? answer.tokens;
    if (started) answer.seconds = (performance.now() - started) / 1000;
    changed(answer);
    save();
  }
}

/** What comes now is said at `steering`: each chunk tells it, so a move stands before the very word it turned. */
function saidAt(answer, steering) {
  if (!same(answer.moves.at(-1)?.steering ?? answer.steering, steering)) answer.moves.push({ at: answer.text.length, steering });
}
