// What the first screen asks of the server, asked before the other modules are here: so a list is painted a few round trips sooner.

export const query = (values) => new URLSearchParams(Object.entries(values).filter(([, v]) => v !== "" && v !== undefined)).toString();

export function route() {
  const [path, search] = location.hash.replace(/^#\/?/, "").split("?");
  const [screen, id] = path.split("/");
  return { screen: screen || "home", id: id ? decodeURIComponent(id) : "", params: Object.fromEntries(new URLSearchParams(search || "")) };
}

// A page of a list. Without a source it is the server's choice.
export const rowsAddress = (params, after) => "/rows?" + query({ source: params.source, filter: params.filter, sort: params.sort, after });

const asked = new Map(); // replies by their address, each of them taken once

export function take(address) {
  const reply = asked.get(address);
  asked.delete(address);
  return reply;
}

export const forget = () => asked.clear(); // what somebody else would have been told

if (!/^#(token|invite)=/.test(location.hash)) {
  const { screen, params } = route();
  const first = ["/me", "/projects", ...(screen === "rows" ? ["/sources", rowsAddress(params)] : [])];
  for (const address of first) {
    asked.set(address, fetch("/studio/api" + address));
    asked.get(address).catch(() => undefined); // whoever takes it says so
  }
}
