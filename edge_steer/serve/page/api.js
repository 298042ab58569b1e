// The server's HTTP interface: JSON, the stream of an answer, and every failure as one kind of error.

const KEY = "edge-steer.key";

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
};

/** status 0: the server could not be reached, or the connection broke off. */
export class ApiError extends Error {
  constructor(message, status = 0, retryAfter = 0, code = null) {
    super(message.charAt(0).toUpperCase() + message.slice(1));
    this.status = status;
    this.retryAfter = retryAfter;
    this.code = code;
  }
}

export const health = () => request("health");
export const getSteering = () => request("v1/steering");
export const moveDials = (id, steering) => request(`v1/steering/${encodeURIComponent(id)}`, { steering });

/** The chunks of an answer, parsed, in order. Raises ApiError, or AbortError where `signal` said so. */
export async function* chat(body, signal) {
  const response = await send("v1/chat/completions", { ...body, stream: true }, signal);
  for await (const line of lines(response.body)) {
    if (!line.startsWith("data:")) continue; // ": ping" and empty lines
    const data = line.slice(5).trim();
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message ?? "The server reported an error", 500);
    yield chunk;
  }
  throw new ApiError("The connection broke off before the answer was whole");
}

async function request(path, body = undefined) {
  const response = await send(path, body);
  return response.json();
}

async function send(path, body, signal) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  const options = { method: body === undefined ? "GET" : "POST", headers, signal, cache: "no-store" };
  if (body !== undefined) options.body = JSON.stringify(body);
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), options); // relative: works behind a proxy's prefix
  } catch (error) {
    throw error.name === "AbortError" ? error : new ApiError("The server cannot be reached");
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  const text = await response.text().catch(() => "");
  let error;
  try {
    error = JSON.parse(text).error;
  } catch {
    error = { message: text.slice(0, 200) };
  }
  const wait = Number(response.headers.get("Retry-After"));
  return new ApiError(error?.message || `HTTP ${response.status}`, response.status, wait > 0 ? wait : 0, error?.code);
}

async function* lines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split(/\r?\n/);
      rest = parts.pop();
      yield* parts;
    }
  } catch (error) {
    throw error.name === "AbortError" ? error : new ApiError("The connection broke off before the answer was whole");
  } finally {
    reader.cancel().catch(() => {}); // an answer that is left early must not go on in the background
  }
}
