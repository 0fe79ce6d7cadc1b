// Requests to the studio's API. An error carries the server's one sentence.

export class ApiError extends Error {
  constructor(status, said) {
    super(said.error || "The server gave no reason.");
    this.status = status;
    this.said = said;
  }
}

export async function api(method, path, body) {
  let reply;
  try {
    reply = await fetch("/studio/api" + path, {
      method,
      headers: body === undefined ? {} : { "Content-Type": "application/json" },
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch {
    throw new ApiError(0, { error: "The server cannot be reached." });
  }
  const said = await reply.json().catch(() => ({}));
  if (!reply.ok) throw new ApiError(reply.status, said);
  return said;
}

export const query = (values) => new URLSearchParams(Object.entries(values).filter(([, v]) => v !== "" && v !== undefined)).toString();

// randomUUID exists only where the address is https or this machine.
export function uuid() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const hex = [...bytes].map((b) => b.toString(16).padStart(2, "0")).join("");
  return [hex.slice(0, 8), hex.slice(8, 12), hex.slice(12, 16), hex.slice(16, 20), hex.slice(20)].join("-");
}
