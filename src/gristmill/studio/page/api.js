// Requests to the studio's API. An error carries the server's one sentence.

import { take } from "./early.js";

export class ApiError extends Error {
  constructor(status, said) {
    super(said.error || "The server gave no reason.");
    this.status = status;
    this.said = said;
  }
}

async function ask(method, path, body, signal) {
  let reply;
  try {
    reply = await ((method === "GET" && take(path)) || fetch("/studio/api" + path, {
      method,
      headers: body === undefined ? {} : { "Content-Type": "application/json" },
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
    }));
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { error: "The server cannot be reached." });
  }
  if (!reply.ok) throw new ApiError(reply.status, await reply.json().catch(() => ({})));
  return reply;
}

export async function api(method, path, body) {
  return (await ask(method, path, body)).json().catch(() => ({}));
}

// The lines of an answer that comes by and by, each as it arrives. `signal` ends it, here and on the server.
export async function* lines(path, body, signal) {
  const reader = (await ask("POST", path, body, signal)).body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    const found = (rest + decoder.decode(value, { stream: !done })).split("\n");
    rest = done ? "" : found.pop();
    for (const line of found) if (line) yield JSON.parse(line);
    if (done) return;
  }
}

// randomUUID exists only where the address is https or this machine.
export function uuid() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const hex = [...bytes].map((b) => b.toString(16).padStart(2, "0")).join("");
  return [hex.slice(0, 8), hex.slice(8, 12), hex.slice(12, 16), hex.slice(16, 20), hex.slice(20)].join("-");
}
